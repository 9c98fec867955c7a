"""Names of models and data: a hub name, or a path on this machine."""

import os
from pathlib import Path
from typing import Any


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
        `ValueError`: If the name has the form of a path, or begins with a folder that is here, and does not exist.
    """
    if not isinstance(name, str) or Path(name).expanduser().exists():
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


def refuse_unwritable_folder(folder: str | Path, what: str) -> None:
    """
    Raise for a folder that cannot be made or written into, before the work whose results it is to hold.

    Args:
        folder (`str` or `Path`):
            The folder, there or not.
        what (`str`):
            The option that names it, for the error: `"output_dir"`.

    Raises:
        `ValueError`: If a file stands there or in the way, or writing is not allowed.
    """
    path = Path(folder).expanduser()
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists() or parent.is_symlink())
    if not there.is_dir():
        raise ValueError(f"`{what}={str(folder)!r}` cannot be a folder: {str(there)!r} is a file. Choose another one.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"`{what}={str(folder)!r}` cannot be written: {str(there)!r} allows it to somebody else only."
        )
