"""What a run of rounds says as it goes on: one line per stage, and a table of what a round's policy wrote, before it is trained."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.data.cache import processes
from trl_ext.rounds.disk import dataset_stage, stage


class Progress:
    """
    The stages of one round, each with a line on the main process when it is done.

    Args:
        where (`str`):
            What the lines begin with, such as `"round 1 of 3"`.
    """

    def __init__(self, where: str):
        self.where = where

    def dataset(
        self,
        name: str,
        target: Path,
        make: Callable[[], Dataset],
        said: Callable[[Dataset], str],
        beside: Sequence[str] = (),
    ) -> Dataset:
        """The dataset in `target`, as [`dataset_stage`] has it; `said` says what it holds."""
        return self._announced(name, target, lambda: dataset_stage(target, make, beside), said)

    def stage(
        self,
        name: str,
        target: Path,
        work: Callable[[], None],
        said: Callable[[], str],
        beside: Sequence[str] = (),
    ) -> None:
        """`work` done once, as [`stage`] has it; `said` says what came of it."""
        self._announced(name, target, lambda: stage(target, work, beside), lambda _: said())

    def _announced(self, name: str, target: Path, work: Callable[[], Any], said: Callable[[Any], str]) -> Any:
        before = target.with_name(f"{target.name}.done").exists()
        began = time.monotonic()
        result = work()
        if processes().is_main_process:
            took = "done before" if before else duration(time.monotonic() - began)
            print(f"{self.where}  {name:<11}  {said(result)}  ({took})", flush=True)
        return result


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def sampled(samples: Dataset) -> str:
    """How many completions of how many prompts."""
    return f"{counted(sum(map(len, samples['completions'])), 'completion')} of {counted(len(samples), 'prompt')}"


def scored_of(samples: Dataset) -> Callable[[Dataset], str]:
    """How many of these completions have a score."""

    def said(scored: Dataset) -> str:
        text = counted(sum(map(len, scored["scores"])), "score")
        out = len(samples) - len(scored)
        return text + (f", {counted(out, 'prompt')} left out: fewer than two completions with text" if out else "")

    return said


def paired(pairs: Dataset) -> str:
    """How many pairs or groups."""
    return counted(len(pairs), "pair" if "chosen" in pairs.column_names else "group")


def trained_in(folder: Path) -> Callable[[], str]:
    """How many steps the training of a round had, and its loss in the first and the last that were logged."""

    def said() -> str:
        steps = [entry for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
        if not steps:
            return "no step was logged: `training.logging_steps` is larger than their number"
        first, last = steps[0], steps[-1]
        change = f"loss {first['loss']:.3f}" + (f" to {last['loss']:.3f}" if len(steps) > 1 else "")
        return f"{counted(last['step'], 'step')}, {change}"

    return said


def counted(number: int, word: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{number} {word}" + ("" if number == 1 else "s")
