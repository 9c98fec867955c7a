"""Results on disk, whatever becomes of the process that writes them."""

from pathlib import Path

import pytest

from trl_ext.data.cache import Ledger, write_atomically


def test_a_torn_line_is_passed_over(tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with open(ledger.path, "a") as file:
        file.write('["b", 2.')
    assert Ledger(tmp_path, "x").read() == {"a": 1.0}
    Ledger(tmp_path, "x").append({"c": 3.0})
    assert Ledger(tmp_path, "x").read() == {"a": 1.0, "c": 3.0} and Ledger(tmp_path, "y").read() == {}


@pytest.mark.parametrize(
    "line",
    [b"1", b"null", b'"ab"', b'["b"]', b'["b", "2"]', b"[1, 2.0]", b'["b", 2.0, 3]', b"\xff\x00", b"{}"],
    ids=repr,
)
def test_what_is_no_result_is_passed_over(line, tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with open(ledger.path, "ab") as file:
        file.write(line + b"\n")
    ledger.append({"c": 3.0})
    assert Ledger(tmp_path, "x").read() == {"a": 1.0, "c": 3.0}


def test_two_runs_on_one_folder(tmp_path):
    """Both write at once: neither into the other's lines, and what one has done the other need not do."""
    first, second = Ledger(tmp_path, "x"), Ledger(tmp_path, "x")
    first.append({"a": 1.0})
    with open(first.path, "a") as file:  # in the middle of a line
        file.write('["b", ')
        file.flush()
        second.append({"c": 3.0})
        file.write("2.0]\n")
    assert first.read() == second.read() == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_appending_does_not_read(tmp_path, monkeypatch):
    """The files may be large."""
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with monkeypatch.context() as patch:
        for name in ("read_bytes", "read_text"):
            patch.delattr(Path, name)
        ledger.append({"b": 2.0})
    assert ledger.read() == {"a": 1.0, "b": 2.0}


def test_atomic_files(tmp_path):
    write_atomically(tmp_path / "a" / "b.json", "1")
    assert (tmp_path / "a" / "b.json").read_text() == "1" and len(list((tmp_path / "a").iterdir())) == 1
