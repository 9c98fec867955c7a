"""A dataset by hub name or local path."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.utils import logging

from trl_ext.data.paths import BUILDERS, refuse_misread_files, refuse_missing_path, refuse_unreadable_data
from trl_ext.reading import read_json


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_preferences(name_or_path: str, split: str = "train") -> Dataset:
    """
    Load one split of a dataset.

    Args:
        name_or_path (`str`):
            A name on the Hugging Face Hub; a JSON, JSON Lines, CSV or Parquet file; a folder of such files; or a folder
            written by [`~datasets.Dataset.save_to_disk`].
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. A single file is one split, whatever it is called.

    Raises:
        `ValueError`: For a file of another kind, for what cannot be read, with the file and the line, and where there is no
            such dataset or split.
    """
    if not isinstance(name_or_path, (str, Path)):
        raise ValueError(
            f"The dataset {name_or_path!r} is a {type(name_or_path).__name__}; expected a name or a path."
        )
    name_or_path = str(name_or_path)
    refuse_unreadable_data(name_or_path)
    path = Path(name_or_path).expanduser()
    refuse_misread_files(path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would say of an error is in ours
    try:
        dataset = _load(path, name_or_path)
        for part in dataset.values() if isinstance(dataset, DatasetDict) else [dataset]:
            part.data.table.validate(full=True)  # else a byte that is not UTF-8 fails where its row is first read
    except Exception as error:  # each reader has its own
        raise ValueError(_reason(path, name_or_path, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{name_or_path!r} has no split {split!r}; it has {sorted(dataset)}.")
        return dataset[split]
    return dataset


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """A tokenizer by hub name or folder; a `ValueError` in one sentence where there is none."""
    from transformers import AutoTokenizer  # which nobody needs who counts words

    refuse_missing_path(name_or_path, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # of whatever kind: it is about this name
        raise ValueError(f"Cannot load the tokenizer {name_or_path!r}: {str(error).strip()}") from error


def _load(path: Path, name: str) -> Dataset | DatasetDict:
    if path.is_file():
        return load_dataset(BUILDERS[path.suffix.lower()], data_files=str(path), split="train")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    return load_dataset(str(path) if path.is_dir() else name)


def _reason(path: Path, name: str, error: Exception) -> str:
    """Why a dataset cannot be read, in terms of its files."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip() or type(error).__name__
    if not path.exists():
        known = "" if isinstance(error, FileNotFoundError) else " or the hub cannot be reached"
        return (
            f"There is no dataset {name!r}: no file or folder of that name here, and none on the hub{known} ({said})."
        )
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix.lower() in BUILDERS)
    if not files:
        return f"Cannot read {name!r}: the folder holds no file that ends in {sorted(BUILDERS)}."
    columns = {}
    for file in files:
        try:
            columns[file.name] = _columns(file)
        except (ValueError, OSError) as problem:
            return f"Cannot read {str(file)!r}: {problem}"
    if len({tuple(sorted(names)) for names in columns.values()}) > 1:
        shown = "; ".join(f"{file} has {names}" for file, names in columns.items())
        return f"Cannot read {name!r}: its files have different columns. {shown}."
    return f"Cannot read {name!r}: {said}"


def _columns(file: Path) -> list[str]:
    """Columns of a file; a `ValueError` that says the line for one that cannot be read."""
    if not file.stat().st_size:
        raise ValueError("the file is empty.")
    if file.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_schema(file).names
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text: the byte at position {error.start} is not UTF-8.") from error
    if not text.strip():
        raise ValueError("the file is empty.")
    if file.suffix.lower() == ".csv":
        if len(text.split("\n")) < 2 or not text.split("\n", maxsplit=1)[1].strip():
            raise ValueError("the file has a header and no rows.")
        return text.split("\n", maxsplit=1)[0].strip().split(",")
    return _json_columns(text)


def _json_columns(text: str) -> list[str]:
    """Columns of JSON, one object per line or one list of objects."""
    if text.lstrip().startswith("["):
        rows = [(None, row) for row in _parsed(text, 1)]
        if not rows:
            raise ValueError("the file holds no rows.")
    else:
        rows = [(n, _parsed(line, n)) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            where = "" if number is None else f" of line {number}"
            raise ValueError(f"a row{where} is {str(row)[:60]!r}; expected an object with columns.")
    return list(rows[0][1])


def _parsed(text: str, line: int) -> Any:
    try:
        return read_json(text)
    except json.JSONDecodeError as error:
        number = line + error.lineno - 1
        shown = text.split("\n")[error.lineno - 1].strip()[:60]
        raise ValueError(f"line {number} is no JSON ({error.msg}, column {error.colno}): {shown!r}") from error
    except ValueError as error:
        raise ValueError(f"line {line}: {error}.") from error
