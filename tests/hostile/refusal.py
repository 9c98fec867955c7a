"""What every malformed input has to end in: one error of ours that says what was given, and nothing written."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trl_ext
from trl_ext.cli import main


OURS = Path(trl_ext.__file__).parent


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, as bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(action: Callable[[], Any], said: str, folder: Path) -> None:
    """`action` raises a `ValueError` or `TypeError` in our code that says `said`, and `folder` is as it was."""
    before = contents(folder)
    with pytest.raises((ValueError, TypeError)) as caught:
        action()
    where = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert OURS in where.parents, f"raised in {where}: {caught.value}"
    assert said in str(caught.value), str(caught.value)
    assert contents(folder) == before


def command_refused(arguments: list[str], said: str, folder: Path, capfd: pytest.CaptureFixture) -> None:
    """The command ends with exit code 2 and one message, without a traceback, and `folder` is as it was."""
    before = contents(folder)
    assert main(arguments) == 2
    printed = capfd.readouterr().err
    assert printed.count("trl-ext: error: ") == 1, printed
    message = printed.partition("trl-ext: error: ")[2]
    assert said in message, message
    assert "Traceback" not in printed and len(message) < 4000, printed
    assert contents(folder) == before
