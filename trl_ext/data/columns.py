"""Which dataset columns reach the losses, and whether what they hold can be used. Checked before a model is loaded."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from trl_ext.data.checks import is_finite_number


SCORES = ("score_chosen", "score_rejected")
PAIRS = (SCORES, ("chosen_empty_trace", "rejected_empty_trace"))
TEXT_COLUMNS = ("chosen_empty_trace", "rejected_empty_trace")
WEIGHT = "weight"
# Of float32, in which the columns reach the losses
LARGEST = 3.4e38


def columns_of(dataset: Dataset | IterableDataset, split: str) -> list[str]:
    """Names of the dataset's columns; an empty dataset is a `ValueError`."""
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise ValueError(f"The {split} dataset is empty: it has no rows.")
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {split} dataset is empty: it gave no row.")
    if not isinstance(first, Mapping):
        raise ValueError(
            f"The first row of the {split} dataset is {first!r:.80}; expected a dict, a value for each column."
        )
    return list(first)


def over_splits(dataset: Any, function: Callable[[Any, str], Any], split: str = "eval") -> Any:
    """`function` of a dataset and its name, or of each in a dict of them by its key; `None` stays, all else is a `TypeError`."""
    if isinstance(dataset, Mapping):
        return type(dataset)({name: over_splits(each, function, name) for name, each in dataset.items()})
    if dataset is not None and not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"The {split} dataset is a {type(dataset).__name__}; expected a `datasets.Dataset`, an `IterableDataset`, or a dict of them."
        )
    return None if dataset is None else function(dataset, split)


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


def one_score_losses(losses: Mapping[str, Any]) -> list[str]:
    """Names of the losses that read scores and take no list of them."""
    return [
        name
        for name, loss in losses.items()
        if not loss.takes_lists and {*SCORES} & {*loss.required_columns, *loss.optional_columns}
    ]


def takes_each_reward(losses: Mapping[str, Any]) -> bool:
    """
    Whether several rewards reach the losses of a run as lists, one number per reward, and not added up.

    Raises:
        `ValueError`: If a loss takes lists and another reads one score: their sum would make another method of the first.
    """
    lists, single = [name for name, loss in losses.items() if loss.takes_lists], one_score_losses(losses)
    if lists and single:
        raise ValueError(
            f"Of several rewards {lists} take each and {single} the sum, so one run cannot give both what they read. Give one "
            "reward, which may combine several, or train the losses apart."
        )
    return bool(lists)


def list_lengths(dataset: Dataset | IterableDataset, columns: Iterable[str]) -> dict[str, int]:
    """Of the `columns` whose first row holds a list, how long it is."""
    columns = list(columns)
    if not columns:
        return {}
    if isinstance(dataset, Dataset):
        first = dataset.select_columns(columns).with_format("arrow")[:1].to_pylist()[0]
    else:
        first = next(iter(dataset))
    return {name: length for name in columns if (length := _length(first.get(name))) is not None}


def require_same_lists(lengths: Mapping[str, int], expected: Mapping[str, int], split: str) -> None:
    """Raise a `ValueError` where a dataset has lists of other lengths than the training data, or only one of the two has lists."""
    for name in dict.fromkeys((*expected, *lengths)):
        found, there = lengths.get(name), expected.get(name)
        if found != there:
            raise ValueError(
                f"The column {name!r} of the {split} dataset holds {_form(found)}, that of the train dataset {_form(there)}. Score "
                "both alike: with the same reward models, in the same order."
            )


def checked(
    dataset: Dataset | IterableDataset, columns: Iterable[str], losses: Mapping[str, Any], split: str
) -> Dataset | IterableDataset:
    """
    The dataset, once its numeric `columns` have been read and found usable.

    A stream is checked as it is read: its first row now, each other row when it comes, with the row's number.

    Raises:
        `ValueError`: For a value that is missing, no number, NaN, infinite or out of range, for rows that a loss cannot take, and
            for lists of scores that a loss cannot take or that are not alike in all rows. Names the column and the row.
    """
    numeric = [column for column in columns if column not in TEXT_COLUMNS]
    if not numeric:
        return dataset
    if isinstance(dataset, Dataset):
        table = dataset.select_columns(numeric).with_format("arrow")[:]
        values = {name: table[name].to_pylist() for name in numeric}
        check_values(values, losses, split)
        if WEIGHT in values and values[WEIGHT] and not any(values[WEIGHT]):
            raise ValueError(f"All weights of the {split} dataset are 0: nothing would be learnt from it.")
        return dataset
    first = next(iter(dataset))

    def check_row(example: dict, index: int) -> dict:
        values = {name: [example.get(name)] for name in numeric}
        check_values(values, losses, split, first_row=index, like=first)
        return example

    check_row(first, 0)
    return dataset.map(check_row, with_indices=True)


def check_values(
    values: dict[str, list],
    losses: Mapping[str, Any],
    split: str,
    first_row: int = 0,
    like: Mapping[str, Any] | None = None,
) -> None:
    """
    Raise a `ValueError` for the first value that cannot be used.

    Args:
        values (`dict[str, list]`):
            Whole columns by name.
        losses (`dict[str, Loss]`):
            The losses, by name.
        split (`str`):
            What the dataset is called in errors.
        first_row (`int`, *optional*, defaults to `0`):
            Number of the first row.
        like (`dict[str, Any]`, *optional*):
            The row whose lists all others have to match; the first of `values` by default.
    """
    tensors, lengths = {}, {}
    for name, column in values.items():
        lengths[name] = _length(column[0] if like is None else like.get(name))
        for row, value in enumerate(column):
            problem = _problem(name, value, lengths[name], losses)
            if problem:
                raise ValueError(
                    f"The column {name!r} of the {split} dataset {problem} in row {first_row + row}: {value!r}. Columns "
                    f"read here: {sorted(values)}."
                )
        tensors[name] = torch.tensor(column, dtype=torch.float64)
    chosen, rejected = (lengths.get(name) for name in SCORES)
    if set(SCORES) <= set(values) and chosen != rejected:
        raise ValueError(
            f"Row {first_row} of the {split} dataset has {_form(chosen)} in {SCORES[0]!r} and {_form(rejected)} in {SCORES[1]!r}. Give "
            "both completions the scores of the same reward models, in the same order."
        )
    for loss in losses.values():
        bad = loss.check_columns(tensors)
        rows = len(next(iter(values.values())))
        if bad is not None and not (isinstance(bad, torch.Tensor) and bad.shape == (rows,)):
            raise ValueError(
                f"`check_columns` of the loss {type(loss).__qualname__} gave {bad!r:.80}; expected None, or a tensor with one boolean for "
                f"each of the {rows} rows."
            )
        if bad is not None and bad.any():
            row = int(bad.nonzero()[0])
            shown = ", ".join(f"{name}={column[row]}" for name, column in values.items() if name != WEIGHT)
            count = f"{int(bad.sum())} of {len(bad)} pairs" if len(bad) > 1 else "A pair"
            raise ValueError(
                f"{count} of the {split} dataset cannot be used, the first in row {first_row + row} ({shown}). "
                f"{loss.column_help}"
            )


def _length(value: object) -> int | None:
    """How long a list is; `None` for what is none."""
    return len(value) if isinstance(value, (list, tuple)) else None


def _form(length: int | None) -> str:
    return "a number" if length is None else f"a list of {length}"


def _problem(name: str, value: object, length: int | None, losses: Mapping[str, Any]) -> str | None:
    """What is wrong with a value; `length` is that of the lists in this column, `None` where it holds numbers."""
    if name in SCORES and isinstance(value, (list, tuple)):
        return _problem_of_list(value, length, losses)
    if name in SCORES and length is not None and value is not None:
        return f"holds no list, which another row does ({_form(length)}),"
    if value is None:
        return "has no value"
    if isinstance(value, str):
        return f"holds text, not a number (convert it: dataset.cast_column({name!r}, Value('float32'))),"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"holds a {type(value).__name__}, not a number,"
    if not is_finite_number(value):
        return "is not finite"
    if abs(value) > LARGEST:
        return "is larger than float32 can hold, in which training computes,"
    if name == "preference_prob" and not 0 <= value <= 1:
        return "is no probability (expected a value in [0, 1])"
    if name.endswith("_logps") and value > 0:
        return "is above 0, which no log-probability is (expected nats, the logarithm of a probability),"
    if name == WEIGHT and value < 0:
        return "is negative (expected a weight of at least 0)"
    return None


def _problem_of_list(value: Sequence, length: int | None, losses: Mapping[str, Any]) -> str | None:
    """What is wrong with the scores that several reward models gave a completion."""
    single = one_score_losses(losses)
    if single or not any(loss.takes_lists for loss in losses.values()):
        return (
            f"holds a list, not a number, and {single or 'the losses in use'} take one score per completion (take the mean of the "
            "list, or train `reward_distillation` without other losses that read scores),"
        )
    if len(value) != length:
        return f"holds {_form(len(value))}, where another row has {_form(length)},"
    if not value:
        return "holds an empty list, not one score of each reward model,"
    for place, score in enumerate(value):
        if not is_finite_number(score) or abs(score) > LARGEST:
            return f"holds a list with {score!r} at place {place}, not a finite number,"
    return None
