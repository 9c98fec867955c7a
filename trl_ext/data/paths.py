"""Names of models and data: a hub name, or a path on this machine."""

import contextlib
import csv
import os
from pathlib import Path
from typing import Any

from trl_ext.reading import read_json, read_text


# How `load_dataset` reads a file, by its suffix
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
DATA_SUFFIXES = (*BUILDERS, ".arrow", ".txt", ".yaml", ".yml")


def refuse_missing_path(name: Any, what: str) -> None:
    """
    Raise for a name that can only be a local path when nothing is there, before the hub is asked for it.

    Args:
        name (`Any`):
            What the user gave. Only a string is looked at: objects and `None` pass.
        what (`str`):
            What it names, for the error: `"model"`, `"dataset"`, `"tokenizer"`.

    Raises:
        `ValueError`: If the name is empty, or has the form of a path, or begins with a folder that is here, and does not exist.
    """
    if not isinstance(name, str):
        return
    if not name.strip() or "\0" in name:
        raise ValueError(f"The {what} is {name!r}; expected a hub name or a path.")
    if Path(name).expanduser().exists():
        return
    # A hub name is `name` or `owner/name`, and no folder of the working directory
    local = (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
        or Path(name).suffix.lower() in DATA_SUFFIXES
        or ("/" in name and Path(name.split("/", maxsplit=1)[0]).is_dir())
    )
    if local:
        raise ValueError(
            f"There is no {what} {name!r}: it looks like a path on this machine, and nothing is there. The working folder "
            f"is {str(Path.cwd())!r}; a hub name has the form 'owner/name'."
        )


def refuse_unreadable_data(name: Any, what: str = "dataset") -> None:
    """Raise as [`refuse_missing_path`] does, and for a file of a kind that is not read as data."""
    refuse_missing_path(name, what)
    if isinstance(name, str):
        path = Path(name).expanduser()
        if path.is_file() and path.suffix.lower() not in BUILDERS:
            raise ValueError(f"Cannot read {name!r}: expected a file that ends in {sorted(BUILDERS)}.")


def refuse_misread_files(path: Path) -> None:
    """
    Raise a `ValueError` for what the readers of `datasets` do not refuse themselves, in a file or in those of a folder.

    That is a CSV file with two columns of one name, of which the second would get another name, and JSON `null` in place of a row, which
    ends the process.
    """
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        kind = BUILDERS.get(file.suffix.lower()) if file.is_file() else None
        if kind == "csv":
            with (
                open(file, newline="", encoding="utf-8-sig", errors="replace") as lines,
                contextlib.suppress(csv.Error),
            ):
                header = next(csv.reader(lines), [])
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise ValueError(
                        f"Cannot read {str(file)!r}: it has several columns called {twice}. Rename or remove them."
                    )
        elif kind == "json":
            with open(file, "rb") as lines:
                nulls = (number for number, line in enumerate(lines, start=1) if line.strip() == b"null")
                number = next(nulls, None)
            if number is not None and not _is_one_value(file):
                raise ValueError(
                    f"Cannot read {str(file)!r}: a row of line {number} is 'null'; expected an object with columns."
                )


def _is_one_value(file: Path) -> bool:
    """Whether a JSON file holds one object or list over many lines, and not one per line."""
    try:
        return isinstance(read_json(read_text(file)), (dict, list))
    except ValueError:
        return False


def refuse_unwritable_folder(folder: str | Path, what: str) -> None:
    """
    Raise for a folder that cannot be made or written into, before the work whose results it is to hold.

    Args:
        folder (`str` or `Path`):
            The folder, there or not.
        what (`str`):
            The option that names it, for the error: `"output_dir"`.

    Raises:
        `ValueError`: If the name is empty, a file stands there or in the way, or writing is not allowed.
    """
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"`{what}={folder!r}` is a {type(folder).__name__}; expected the path of a folder.")
    if not str(folder).strip() or "\0" in str(folder):
        raise ValueError(f"`{what}={str(folder)!r}` names no folder.")
    path = Path(folder).expanduser()
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists() or parent.is_symlink())
    if not there.is_dir():
        raise ValueError(f"`{what}={str(folder)!r}` cannot be a folder: {str(there)!r} is a file. Choose another one.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"`{what}={str(folder)!r}` cannot be written: {str(there)!r} allows it to somebody else only."
        )
