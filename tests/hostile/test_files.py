"""Files of data and folders that cannot be read, or would be read as something else than they say."""

from pathlib import Path

import pytest

from tests.hostile.refusal import command_refused, refused
from trl_ext.data.load import load_preferences


ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
FILES: dict[str, tuple[str, bytes | str, str]] = {
    "null": ("data.json", "null", "a row of line 1 is 'null'"),
    "a null row": ("data.jsonl", ROW + "null\n" + ROW, "a row of line 2 is 'null'"),
    "a null row in blanks": ("data.jsonl", "\n  null \n" + ROW, "a row of line 2 is 'null'"),
    "latin-1": ("data.jsonl", ROW.replace("b", "é").encode("latin-1"), "is not UTF-8"),
    "latin-1 late": ("data.jsonl", ROW.encode() * 50 + ROW.replace("b", "é").encode("latin-1"), "is not UTF-8"),
    "a thousand objects": ("data.jsonl", '{"a":' * 2000 + "1" + "}" * 2000, "too deeply"),
    "a thousand lists": ("data.json", "[" * 100000, "too deeply"),
    "a name twice": ("data.jsonl", '{"prompt": "a", "prompt": "b"}\n', "twice"),
    "pickle": ("data.jsonl", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch pwned\x85R.", "is not UTF-8"),
    "UTF-16": ("data.jsonl", ROW.encode("utf-16"), "the byte at position 0 is not UTF-8"),
    "a number": ("data.json", "3", "a row of line 1 is '3'"),
    "objects without names": ("data.jsonl", "{}\n{}\n", "data.jsonl"),
    "two headings alike": ("data.csv", "prompt,chosen,chosen,rejected\na,b,c,d\n", "several columns called ['chosen']"),
    "more cells than headings": ("data.csv", "prompt,chosen\na,b,c\na,b,c,d\n", "data.csv"),
    "an open quote": ("data.csv", 'prompt,chosen,rejected\n"a,b,c\n', "data.csv"),
    "binary CSV": ("data.csv", bytes(range(256)), "is not UTF-8"),
    "no Parquet": ("data.parquet", b"PAR1 and no more PAR1", "data.parquet"),
    "half a Parquet": ("data.parquet", b"PAR1", "data.parquet"),
    "pickle by its name": ("data.pkl", b"\x80\x04.", "expected a file that ends in"),
    "Arrow by its name": ("data.arrow", b"ARROW1", "expected a file that ends in"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path, monkeypatch, capfd):
    file, content, said = FILES[name]
    monkeypatch.chdir(tmp_path)
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: load_preferences(file), said, tmp_path)
    command_refused(["inspect", file], said, tmp_path, capfd)


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "a script": ({"data.py": "open('pwned', 'w')", "rows.jsonl": ROW}, "scripts are no longer supported"),
    "an empty folder": ({"notes.md": ""}, "holds no file that ends in"),
    "no state": ({"dataset_info.json": "{}"}, "neither a `Dataset` directory nor"),
    "broken splits": ({"dataset_dict.json": "{"}, "no JSON"),
    "a null row inside": ({"a.jsonl": ROW, "b.jsonl": "null\n"}, "b.jsonl': a row of line 1 is 'null'"),
    "headings alike inside": ({"a.csv": "prompt,prompt\na,b\n"}, "several columns called ['prompt']"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, tmp_path, monkeypatch, capfd):
    files, said = FOLDERS[name]
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for file, text in files.items():
        Path("data", file).write_text(text)
    refused(lambda: load_preferences("data"), said, tmp_path)
    command_refused(["inspect", "data"], said, tmp_path, capfd)


@pytest.mark.parametrize(
    "name", ["", "  ", "a\0b", "http://example.org/data.jsonl", "s3://bucket/data.jsonl", "../nowhere"]
)
def test_names_of_nothing(name, tmp_path, monkeypatch, capfd):
    """An empty name is not the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(ROW)
    said = "looks like a path on this machine" if name.strip("\0 ab") else "expected a hub name or a path"
    command_refused(["inspect", name], f"{name!r}", tmp_path, capfd)
    refused(lambda: load_preferences(name), said, tmp_path)


@pytest.mark.parametrize("name", [None, 3, ["data.jsonl"], b"data.jsonl"])
def test_names_of_other_types(name, tmp_path):
    refused(lambda: load_preferences(name), repr(name), tmp_path)


def test_a_null_inside_of_a_row_is_no_row(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"prompt": "a", "scores": [\n1.0,\nnull\n]}]')
    assert load_preferences(str(path))[0] == {"prompt": "a", "scores": [1.0, None]}
