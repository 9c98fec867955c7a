"""Which dataset columns reach the losses, and whether what they hold can be used. Checked before a model is loaded."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset


PAIRS = (("score_chosen", "score_rejected"), ("chosen_empty_trace", "rejected_empty_trace"))
TEXT_COLUMNS = ("chosen_empty_trace", "rejected_empty_trace")
WEIGHT = "weight"


def columns_of(dataset: Dataset | IterableDataset, split: str) -> list[str]:
    """Names of the dataset's columns; an empty dataset is a `ValueError`."""
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise ValueError(f"The {split} dataset is empty: it has no rows.")
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {split} dataset is empty: it gave no row.")
    return list(first)


def over_splits(dataset: Any, function: Callable[[Any, str], Any], split: str = "eval") -> Any:
    """`function` of a dataset and its name, or of each in a dict of them by its key; what is no dataset stays as it is."""
    if isinstance(dataset, Mapping):
        return type(dataset)({name: over_splits(each, function, name) for name, each in dataset.items()})
    return function(dataset, split) if isinstance(dataset, (Dataset, IterableDataset)) else dataset


def require_same_columns(columns: Iterable[str], available: Sequence[str], split: str) -> None:
    """Raise a `ValueError` where a dataset lacks `columns` that are read from the training data."""
    missing = [column for column in columns if column not in available]
    if missing:
        raise ValueError(
            f"The {split} dataset lacks the columns {missing}, which are read from the train dataset. Its columns are "
            f"{sorted(available)}."
        )


def used_columns(available: Sequence[str], losses: Mapping[str, Any], split: str) -> list[str]:
    """
    Columns that the losses read, in a fixed order.

    Args:
        available (`Sequence[str]`):
            The dataset's columns.
        losses (`Mapping[str, Loss]`):
            The losses, by name.
        split (`str`):
            What the dataset is called in errors: `"train"`, `"eval"`.

    Raises:
        `ValueError`: If a required column is absent, or one column of a pair stands without the other.
    """
    used: list[str] = []
    for name, loss in losses.items():
        for column in loss.required_columns:
            if column not in available:
                known = (*loss.required_columns, *loss.optional_columns, "prompt", "chosen", "rejected")
                others = [other for other in available if other not in known]
                near = difflib.get_close_matches(column, others, n=1)
                near += [other for other in others if sorted(other.split("_")) == sorted(column.split("_"))]
                hint = f" If {near[-1]!r} is it: dataset.rename_column({near[-1]!r}, {column!r})." if near else ""
                if not near and column in PAIRS[0]:
                    hint = " `trl_ext.data.score_preferences` adds scores."
                raise ValueError(
                    f"The loss {name!r} needs the column {column!r}, which the {split} dataset does not have. Its "
                    f"columns are {sorted(available)}.{hint}"
                )
        used += [column for column in (*loss.required_columns, *loss.optional_columns) if column in available]
    for pair in PAIRS:
        alone = [column for column in pair if column in used]
        if len(alone) == 1:
            other = pair[1 - pair.index(alone[0])]
            raise ValueError(
                f"The {split} dataset has the column {alone[0]!r} without {other!r}: a pair needs both, or neither. "
                f"Its columns are {sorted(available)}."
            )
    if losses and WEIGHT in available:
        used.append(WEIGHT)
    return list(dict.fromkeys(used))


def checked(
    dataset: Dataset | IterableDataset, columns: Iterable[str], losses: Mapping[str, Any], split: str
) -> Dataset | IterableDataset:
    """
    The dataset, once its numeric `columns` have been read and found usable.

    A stream is checked as it is read: its first row now, each other row when it comes, with the row's number.

    Raises:
        `ValueError`: For a value that is missing, no number, NaN, infinite or out of range, and for rows that a loss
            cannot take. Names the column and the row.
    """
    numeric = [column for column in columns if column not in TEXT_COLUMNS]
    if not numeric:
        return dataset
    if isinstance(dataset, Dataset):
        table = dataset.select_columns(numeric).with_format("arrow")[:]
        check_values({name: table[name].to_pylist() for name in numeric}, losses, split)
        return dataset

    def check_row(example: dict, index: int) -> dict:
        check_values({name: [example.get(name)] for name in numeric}, losses, split, first_row=index)
        return example

    check_row(next(iter(dataset)), 0)
    return dataset.map(check_row, with_indices=True)


def check_values(values: dict[str, list], losses: Mapping[str, Any], split: str, first_row: int = 0) -> None:
    """Raise a `ValueError` for the first value that cannot be used; `values` are whole columns by name."""
    tensors = {}
    for name, column in values.items():
        for row, value in enumerate(column):
            problem = _problem(name, value)
            if problem:
                raise ValueError(
                    f"The column {name!r} of the {split} dataset {problem} in row {first_row + row}: {value!r}. Columns "
                    f"read here: {sorted(values)}."
                )
        tensors[name] = torch.tensor(column, dtype=torch.float64)
    for loss in losses.values():
        bad = loss.check_columns(tensors)
        if bad is not None and bad.any():
            row = int(bad.nonzero()[0])
            shown = ", ".join(f"{name}={column[row]}" for name, column in values.items() if name != WEIGHT)
            count = f"{int(bad.sum())} of {len(bad)} pairs" if len(bad) > 1 else "A pair"
            raise ValueError(
                f"{count} of the {split} dataset cannot be used, the first in row {first_row + row} ({shown}). "
                f"{loss.column_help}"
            )


def _problem(name: str, value: object) -> str | None:
    if value is None:
        return "has no value"
    if isinstance(value, str):
        return f"holds text, not a number (convert it: dataset.cast_column({name!r}, Value('float32'))),"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"holds a {type(value).__name__}, not a number,"
    if not math.isfinite(value):
        return "is not finite"
    if name == "preference_prob" and not 0 <= value <= 1:
        return "is no probability (expected a value in [0, 1])"
    if name == WEIGHT and value < 0:
        return "is negative (expected a weight of at least 0)"
    return None
