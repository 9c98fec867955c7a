"""Config files that are no YAML, hold something else than settings, or settings that cannot be; and configs that are no file."""

from pathlib import Path

import pytest

from tests.hostile.refusal import command_refused
from trl_ext.reading import MOST_VALUES, read_json, read_yaml


ROUNDS = "model: a/model\nprompts: a/data\noutput_dir: out\nreward_funcs: a/reward\n"
DPO = "model_name_or_path: a/model\ndataset_name: a/data\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
# Nine of nine of nine ...: five lines with 9^6 values
BOMB = "".join(
    f"- &{name} [{', '.join(of * 9)}]\n"
    for name, of in zip("abcdef", (["x"], *(["*" + c] for c in "abcde")), strict=True)
)

# Text, and what the error has to say, of a config for either command
EITHER: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "settings"),
    "null": ("null", "settings"),
    "list": ("- a\n- b", "settings"),
    "number": ("3", "settings"),
    "text": ("hello", "settings"),
    "tab": ("\tbeta: 1", "is not YAML"),
    "unclosed": ("beta: [1", "is not YAML"),
    "two documents": ("beta: 1\n---\nbeta: 2\n", "is not YAML"),
    "a list as name": ("? [a, b]\n: c\n", "is not YAML"),
    "no such anchor": ("beta: *a", "is not YAML"),
    "NUL": ("beta: a\0b", "is not YAML"),
    "month 13": ("beta: 2020-13-40", "cannot be read as YAML"),
    "python object": ("beta: !!python/object/apply:os.system ['touch pwned']", "python/object/apply:os.system"),
    "python name": ("beta: !!python/name:os.system", "python/name:os.system"),
    "python module": ("beta: !!python/module:os", "python/module:os"),
    "own tag": ("beta: !secret a", "!secret"),
    "a name twice": ("beta: 1\nseed: 3\nbeta: 2\n", "the name 'beta' twice, the second time in line 3"),
    "a name twice inside": ("training: {beta: 1, beta: 2}", "the name 'beta' twice"),
    "a cycle": ("training: &a {model_init_kwargs: *a}", "stands within itself"),
    "a list in itself": ("&a [*a]", "stands within itself"),
    "a bomb": (BOMB, f"more than {MOST_VALUES} values"),
    "a thousand lists": ("beta: " + "[" * 500, "too deeply"),
    "latin-1": ("beta: é".encode("latin-1"), "the byte at position 6 is not UTF-8"),
    "binary": (bytes(range(256)), "is not UTF-8"),
    "UTF-16": ("beta: 1".encode("utf-16"), "is not UTF-8"),
    "pickle": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch pwned\x85R.", "is not UTF-8"),
}  # fmt: skip
OF_ROUNDS: dict[str, tuple[str, str]] = {
    "names of two types": (ROUNDS + "3: 4\nx: 5\n", "unknown settings [3, 'x']"),
    "seed a date": (ROUNDS + "seed: 2020-01-01\n", "datetime.date(2020, 1, 1)"),
    "rounds a fraction": (ROUNDS + "rounds: 1.0\n", "`rounds=1.0`"),
    "replay binary": (ROUNDS + "replay: !!binary aGVsbG8=\n", "`replay=b'hello'`"),
    "training a set": (ROUNDS + "training: !!set {a, b}\n", "must be a dictionary of settings"),
    "loss a number": (ROUNDS + "training: {loss_type: 3}\n", "3"),
    "loss a mapping": (ROUNDS + "training: {loss_type: {a: 1}}\n", "names no loss"),
    "temperature": (ROUNDS + "sampling: {temperature: -1}\n", "`temperature=-1`"),
    "no prompts": ("model: a/model\noutput_dir: out\nreward_funcs: a/reward\n", "['prompts'] missing"),
    "no settings": (ROUNDS + "sampling: fast\n", "`sampling='fast'`"),
    "rewards in themselves": (ROUNDS.replace("a/reward", "&r [*r]"), "stands within itself"),
    "a relative module": (ROUNDS.replace("a/reward", "'..:f'"), "'..:f' cannot be imported"),
    "no reward": (ROUNDS.replace("a/reward", "''"), "''"),
}  # fmt: skip
OF_DPO: dict[str, tuple[str, str]] = {
    "names of two types": (DPO + "3: 4\nx: 5\n", "unknown settings [3, 'x']"),
    "no name": (DPO + "null: 4\n", "unknown settings [None]"),
    "beta a list": (DPO + "beta: [1]\n", "`beta=[1]` is a list"),
    "beta a mapping": (DPO + "beta: {a: 1}\n", "is a dict; expected a number"),
    "beta text": (DPO + "beta: high\n", "invalid float value: 'high'"),
    "seed a date": (DPO + "seed: 2020-01-01\n", "is a date; expected a whole number"),
    "loss a number": (DPO + "loss_type: 3\n", "3"),
    "data a number": (DPO.replace("a/data", "3"), "`dataset_name=3` is a int"),
    "data a list": (DPO.replace("a/data", "[a]"), "`dataset_name=['a']` is a list"),
    "model a number": (DPO.replace("a/model", "3"), "`model_name_or_path=3` is a int"),
    "datasets a number": (DPO + "datasets: 3\n", "`datasets=3` is a int"),
    "datasets a mapping": (DPO + "datasets: {path: a/b}\n", "is a dict; expected a list"),
    "datasets of numbers": (DPO + "datasets: [3]\n", "has the entry 3"),
    "datasets without path": (DPO + "datasets: [{split: train}]\n", "has the entry {'split': 'train'}"),
    "datasets with a number": (DPO + "datasets: [{path: 3}]\n", "has the entry {'path': 3}"),
    "environment text": (DPO + "env: 3\n", "`env=3`"),
    "environment null": (DPO + "env: {A: null}\n", "`env={'A': None}`"),
    "environment number": (DPO + "env: {3: a}\n", "`env={3: 'a'}`"),
    "environment name": (DPO + 'env: {"A=B": c}\n', "`env={'A=B': 'c'}`"),
    "environment NUL": (DPO + 'env: {A: "b\\0c"}\n', "expected environment variables"),
    "trust": (DPO + "trust_remote_code: maybe\n", "Truthy value expected: got maybe"),
}  # fmt: skip
CASES = {
    **{f"{command}: {name}": (command, *case) for command in ("iterate", "dpo") for name, case in EITHER.items()},
    **{f"iterate: {name}": ("iterate", *case) for name, case in OF_ROUNDS.items()},
    **{f"dpo: {name}": ("dpo", *case) for name, case in OF_DPO.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_config_files(name, tmp_path, monkeypatch, capfd):
    command, text, said = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    start = ["iterate", "config.yaml"] if command == "iterate" else ["run", "dpo", "--config", "config.yaml"]
    command_refused(start, said, tmp_path, capfd)


NO_FILES = (
    "https://huggingface.co/owner/name/resolve/main/rounds.yaml",
    "http://example.org/rounds.yaml",
    "hf://datasets/owner/name/rounds.yaml",
    "file:///etc/passwd",
    "owner/name",
    "owner/name/rounds.yaml",
    "gpt2",
    "",
    ".",
    "/dev/null",
    "a\0b",
)


@pytest.mark.parametrize("name", NO_FILES)
def test_a_config_is_a_file_on_this_machine(name, tmp_path, monkeypatch, capfd):
    """A config may name code that is run, so none comes from the hub or the web by its name alone."""
    monkeypatch.chdir(tmp_path)
    command_refused(["iterate", name], "A config is a file on this machine", tmp_path, capfd)
    command_refused(["run", "dpo", "--config", name], f"There is no config file {name!r}", tmp_path, capfd)


def test_what_is_read():
    text = "a: 1e-6\nb: &x [1, yes]\nc: *x\nd: {<<: {e: 1}, e: 2}\n"
    assert read_yaml(text, "here") == {"a": "1e-6", "b": [1, True], "c": [1, True], "d": {"e": 2}}
    assert read_yaml("", "here") is None
    assert read_json('{"a": {"b": [1, null]}, "b": 2}') == {"a": {"b": [1, None]}, "b": 2}


def test_an_unsafe_loader_is_refused():
    import yaml

    with pytest.raises(TypeError, match="no safe loader"):
        read_yaml("a: 1", "here", yaml.UnsafeLoader)
