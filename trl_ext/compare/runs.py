"""Trainings as they lie on disk, and which of them are one experiment."""

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.reading import is_finite_number, read_json, read_text


STATE = "trainer_state.json"
_SEED = re.compile(r"(?<![A-Za-z0-9])(?:seed|s)[-_=]?\d+(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass
class Run:
    """
    What one training logged.

    Attributes:
        path (`Path`):
            As it was given.
        series (`dict[str, dict[float, float]]`):
            Of each metric the value at each step, steps in order.
    """

    path: Path
    series: dict[str, dict[float, float]]


def read_run(path: str | Path) -> Run:
    """
    A run from its folder or file.

    Raises:
        `ValueError`: For what is not there, holds no run, or is empty or broken.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no run {str(path)!r}. Give folders that a trainer wrote, or CSV files of metrics.")
    series = _of_csv(path) if path.is_file() else _of_folder(path)
    if not series:
        raise ValueError(f"The run {str(path)!r} has logged no metric yet.")
    return Run(path, {name: dict(sorted(values.items())) for name, values in series.items()})


def _of_folder(folder: Path) -> dict[str, dict[float, float]]:
    checkpoints = [each for each in folder.glob("checkpoint-*") if each.name.partition("-")[2].isdigit()]
    checkpoints.sort(key=lambda each: int(each.name.partition("-")[2]))
    found = [each / STATE for each in (folder, *checkpoints) if (each / STATE).is_file()]
    if not found:
        inside = sorted(
            {state.parent for state in folder.glob(f"*/{STATE}")}
            | {state.parents[1] for state in folder.glob(f"*/checkpoint-*/{STATE}")}
        )
        names = [each.name for each in inside] or sorted(each.name for each in folder.iterdir())
        there = "it is empty" if not names else f"it holds {names[:8]}{' and more' if len(names) > 8 else ''}"
        hint = (
            " Its folders are runs: give them."
            if inside
            else " A run saves one with each checkpoint, and with `trainer.save_state()`."
        )
        raise ValueError(f"The folder {str(folder)!r} holds no {STATE}, nor does a checkpoint in it; {there}.{hint}")
    # The last checkpoint has the whole history; that of the folder is written at the end
    states = [(state, _history(state)) for state in dict.fromkeys([found[-1], found[0]])]
    _, entries = max(states, key=lambda state: max((entry.get("step", 0) for entry in state[1]), default=0))
    series: dict[str, dict[float, float]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name not in ("step", "epoch") and (isinstance(value, float) or is_finite_number(value)):
                series.setdefault(name, {})[entry["step"]] = float(value)
    return series


def _history(path: Path) -> list[dict[str, Any]]:
    try:
        entries = read_json(read_text(path))["log_history"]
        for entry in entries:
            huge = [name for name, value in entry.items() if type(value) is int and not is_finite_number(value)]
            if not is_finite_number(entry["step"]) or huge:
                raise TypeError(f"a log entry is {entry!r:.120}; expected numbers, and a finite `step`")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = "is empty" if not path.stat().st_size else f"is no state of a trainer ({type(error).__name__}: {error})"
        raise ValueError(f"The file {str(path)!r} {what}. It may have been cut off while it was written.") from error
    return entries


def _of_csv(path: Path) -> dict[str, dict[float, float]]:
    if path.name == STATE:
        return _of_folder(path.parent)
    if path.suffix.lower() != ".csv":
        raise ValueError(
            f"The file {str(path)!r} is no run: give a folder that a trainer wrote, or a CSV file of metrics."
        )
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"The file {str(path)!r} cannot be read as CSV: {error}") from error
    if not rows:
        raise ValueError(f"The file {str(path)!r} has no rows.")
    columns = [name for name in reader.fieldnames if name]
    steps = [name for name in columns if name.strip().lower() == "step"]
    twice = sorted({name for name in columns if columns.count(name) > 1} | ({*steps} if len(steps) > 1 else set()))
    if twice:
        raise ValueError(f"The file {str(path)!r} has several columns called {twice}. Remove all but one.")
    if not steps:
        raise ValueError(f"The file {str(path)!r} has no column 'step'; its columns are {columns}.")
    series: dict[str, dict[float, float]] = {}
    for number, row in enumerate(rows, start=2):
        if None in row:
            raise ValueError(f"Line {number} of {str(path)!r} has more cells than there are columns: {row[None]}.")
        step = _number(row[steps[0]])
        if step is None or not math.isfinite(step):
            raise ValueError(f"Line {number} of {str(path)!r}: the step is {row[steps[0]]!r}; expected a number.")
        for name in columns:
            value = _number(row[name])
            if name != steps[0] and value is not None:
                series.setdefault(name, {})[step] = value
    return series


def _number(text: Any) -> float | None:
    """`None` for a cell that is empty or holds text, such as the name of the run."""
    try:
        return None if "_" in text else float(text)  # Python reads 1_0 as 10
    except (TypeError, ValueError):
        return None


# Groups of runs


def grouped(runs: Sequence[Run], by: str = "seed") -> dict[str, list[Run]]:
    """
    Runs under the names that they are shown by.

    Args:
        runs (`Sequence[Run]`):
            The runs.
        by (`str`, *optional*, defaults to `"seed"`):
            `"seed"`: those whose names differ in a part such as `seed3` or `s3` alone are one; `"folder"`: those that lie in one
            folder are; `"none"`: each is its own.

    Raises:
        `ValueError`: For a run that is given twice, and for seeds that were trained with different losses.
    """
    places = [run.path.resolve() for run in runs]
    twice = next((run.path for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"The run {str(twice)!r} is given twice.")
    shared = Path(os.path.commonpath([place.parent for place in places]))
    groups: dict[str, list[Run]] = {}
    for run, place in zip(runs, places, strict=True):
        name = place.relative_to(shared)
        name = name.with_suffix("") if place.is_file() else name
        label = str(name)
        if by == "folder":
            label = str(name.parent) if name.parent != Path() else shared.name
        elif by == "seed":
            parts = [re.sub(r"([-_.=])[-_.=]+", r"\1", _SEED.sub("", part)).strip("-_.= ") for part in name.parts]
            label = "/".join(filter(None, parts)) or shared.name
        groups.setdefault(label, []).append(run)
    for label, members in groups.items():
        _check_alike(label, members)
    return groups


def _check_alike(label: str, runs: list[Run]) -> None:
    """A checkpoint says which losses a run was trained with: seeds of one experiment have the same."""
    losses = {}
    for run in runs:
        for file in sorted(run.path.glob("**/losses.json"), key=lambda each: each.stat().st_mtime)[-1:]:
            losses.setdefault(file.read_text(), str(run.path))
    if len(losses) > 1:
        raise ValueError(
            f"The runs {list(losses.values())[:2]} would be seeds of {label!r}, but were trained with other losses or "
            "hyper-parameters (`losses.json` in their checkpoints). Show each by itself: --group none."
        )
