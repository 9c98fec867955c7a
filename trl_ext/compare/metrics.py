"""Which metrics of runs are shown, and what is shown of each."""

import difflib
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .runs import Run


# What is shown unless metrics are named: of each row the one that most runs have, the first where several do
SHOWN = (
    ("eval_samples/mean_reward", "eval_objective/scores", "objective/scores"),
    ("eval_samples/kl_to_reference", "eval_objective/kl", "objective/kl"),
    ("eval_samples/mean_length", "eval_completions/mean_length", "completions/mean_length"),
    ("eval_samples/win_rate", "eval_win_rate"),
    ("eval_pairs/preference_accuracy", "eval_rewards/accuracies", "rewards/accuracies"),
    ("eval_loss", "loss"),
)
# Words of a metric's name that say which end is the better one
LOWER = {"loss", "error", "brier", "perplexity"}
HIGHER = {"reward", "rewards", "score", "scores", "accuracy", "accuracies", "rate"}
NEITHER = {"chosen", "rejected", "learning", "reference", "non"}


def chosen_metrics(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[str]:
    """
    The metrics to show: those that are named, which some run must have, or of [`SHOWN`] what is there.

    Raises:
        `ValueError`: For a name that no run has.
    """
    there = sorted({name for run in runs for name in run.series})
    for name in names or ():
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"No run has the metric {name!r}.{hint} There are {there}.")
    if names:
        return list(dict.fromkeys(names))
    counts = {name: sum(name in run.series for run in runs) for name in there}
    best = [max(row, key=lambda name: counts.get(name, 0)) for row in SHOWN]
    found = [name for name in best if counts.get(name)]
    if not found:
        raise ValueError(
            f"None of the metrics that are shown by default is there. Choose some of {there} with --metrics."
        )
    return found


def better(name: str) -> Callable | None:
    """`min` or `max`, by what is the better value of a metric; `None` where neither is."""
    words = set(re.split(r"[/_\W]+", name))
    if words & NEITHER:
        return None
    return min if words & LOWER else max if words & HIGHER else None


@dataclass
class Cell:
    """
    A metric of a group of runs.

    Attributes:
        last (`list[float]`):
            The value at the last step of each run that has it.
        best (`list[float]`):
            Its best one, empty for a metric of which neither end is better. Values that are not finite are none.
        steps (`list[float]`):
            The last step of each run.
    """

    last: list[float]
    best: list[float]
    steps: list[float]


def cell(runs: Sequence[Run], metric: str) -> Cell:
    """The metric of a group."""
    there = [list(run.series[metric].values()) for run in runs if metric in run.series]
    pick = better(metric)
    finite = [[value for value in values if math.isfinite(value)] for values in there]
    return Cell(
        last=[values[-1] for values in there],
        best=[pick(values) for values in finite if values] if pick else [],
        steps=[max(run.series[metric]) for run in runs if metric in run.series],
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and the standard deviation between seeds with `n - 1`, which one seed has not. NaN where a value is not finite."""
    if not values:
        return None, None
    if not all(map(math.isfinite, values)):
        return math.nan, None
    return math.fsum(values) / len(values), statistics.stdev(values) if len(values) > 1 else None
