"""How runs become a verdict: reward within equal KL, settings chosen without the seed they are judged on, intervals, one rule."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ext.metrics.intervals import student_interval


SEEDS = 3  # that a verdict needs
RULE = (
    "Rule. Each effect is written so that a positive one agrees with the paper, and its interval is the 95 % interval of Student's t over "
    "seeds, of paired differences. `holds`: the whole interval is above 0. `does not`: the whole interval is below the smallest effect worth "
    "naming. `undecided`: neither, or fewer than three seeds. No correction for the number of rows: of twenty rows in which nothing is true, one "
    "has an interval without 0."
)
SEARCH = (
    "Comparisons. Every loss has the same number of settings, over beta and its own scale, and each is measured equally often while it trains. "
    "Each measurement is a policy with a KL and a reward; their upper concave hull is the frontier of the loss, what it gives within a KL, "
    "since whoever picks one of two policies by lot has a KL of at most their mean. Two losses are compared at the median KL at which their "
    "settings end, at half and at twice that. Which policies make the frontier is decided, for one seed, by the means over the other seeds: "
    "no seed chooses for itself. The figure is the mean over the three KLs."
)


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured of a claim, and what follows from it."""

    claim: str
    measured: str
    effect: float
    low: float
    high: float
    smallest: float
    verdict: str
    note: str = ""


def verdict(low: float, high: float, smallest: float = 0.0) -> str:
    """`holds`, `does not` or `undecided`, by [`RULE`]."""
    if math.isnan(low) or math.isnan(high):
        return "undecided"
    return "holds" if low > 0 else "does not" if high < smallest else "undecided"


def row(claim: str, measured: str, values: Sequence[float], smallest: float, note: str = "") -> Row:
    """The row of an effect that was measured once per seed."""
    mean, low, high = student_interval(values)
    # Two values that lie close together by chance have an interval of almost no width
    decided = verdict(low, high, smallest) if len(values) >= SEEDS else "undecided"
    return Row(claim, measured, mean, low, high, smallest, decided, note)


def unmeasured(claim: str, measured: str, why: str) -> Row:
    """The row of what could not be measured."""
    return Row(claim, measured, math.nan, math.nan, math.nan, math.nan, "undecided", why)


# The runs of one side: by setting, by seed, the points of the path
Paths = dict[int, dict[int, list[dict[str, Any]]]]


def end_kls(*sides: Paths) -> list[float]:
    """The KL at which each setting ends, a mean over seeds."""
    return [statistics.fmean(points[-1]["kl"] for points in each.values()) for side in sides for each in side.values()]


def common_kls(*sides: Paths) -> tuple[float, float, float]:
    """Where sides are compared: half of the median KL at which their settings end, that, and twice it."""
    middle = statistics.median(end_kls(*sides))
    return middle / 2, middle, 2 * middle


def hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (KL, reward) points are corners of their upper concave hull, from the least KL to the highest reward."""
    corners: list[int] = []
    # Of several points at one KL the best one; what has a higher KL and no more reward is on no frontier
    for at in sorted(range(len(points)), key=lambda each: (points[each][0], -points[each][1])):
        if corners and points[at][1] <= points[corners[-1]][1]:
            continue
        while len(corners) > 1 and _slope(points, corners[-2], at) >= _slope(points, corners[-2], corners[-1]):
            corners.pop()
        corners.append(at)
    return corners


def _slope(points: Sequence[tuple[float, float]], left: int, right: int) -> float:
    (a, low), (b, high) = points[left], points[right]
    return (high - low) / (b - a)


def frontier(
    side: Paths, seeds: Sequence[int], kls: Sequence[float], metric: str = "reward"
) -> dict[int, list[float]]:
    """
    For each seed a metric within each KL, at policies that the other seeds choose by their reward; beyond the last of them its value.

    Args:
        side (`Paths`): With the same number of points for every setting and seed.
        seeds (`Sequence[int]`): Which of its seeds; a single one chooses for itself.
        kls (`Sequence[float]`): Nats.
        metric (`str`, *optional*, defaults to `"reward"`): What is read.
    """
    policies = [(setting, at) for setting, each in side.items() for at in range(len(each[seeds[0]]))]
    found = {}
    for seed in seeds:
        others = [other for other in seeds if other != seed] or [seed]
        means = [
            tuple(statistics.fmean(side[setting][other][at][key] for other in others) for key in ("kl", "reward"))
            for setting, at in policies
        ]
        own = [side[policies[corner][0]][seed][policies[corner][1]] for corner in hull(means)]
        reached, values = zip(*sorted((max(point["kl"], 0.0), point[metric]) for point in own), strict=True)
        found[seed] = [float(np.interp(kl, reached, values)) for kl in kls]
    return found


def chosen(values: dict[int, dict[int, float | None]], seeds: Sequence[int]) -> dict[int, int]:
    """
    For each seed the setting with the best mean over the other seeds (over all, where there is one seed), of those that have a value
    for every seed.
    """
    there = {setting: each for setting, each in values.items() if all(each.get(seed) is not None for seed in seeds)}

    def best(seed: int) -> int:
        others = [other for other in seeds if other != seed] or [seed]
        return max(there, key=lambda setting: statistics.fmean(there[setting][other] for other in others))

    return {seed: best(seed) for seed in seeds}


def compare(
    ours: Paths, theirs: Paths, metric: str = "reward"
) -> tuple[list[float], tuple[float, ...], list[dict[str, float]]]:
    """
    Differences at equal KL, one per seed: `metric` of ours less that of theirs, at policies that are chosen by the reward.

    Returns:
        The differences, the KLs, and what each seed's difference is made of.

    Raises:
        `ValueError`: Where the sides have no seed in common with all settings.
    """
    finished = [set(each) for side in (ours, theirs) for each in side.values()]
    seeds = sorted(set.intersection(*finished)) if ours and theirs else []
    if not seeds:
        raise ValueError("no seed has finished with all settings of both losses")
    sides = [{at: {seed: each[seed] for seed in seeds} for at, each in side.items()} for side in (ours, theirs)]
    kls = common_kls(*sides)
    read = [frontier(side, seeds, kls, metric) for side in sides]
    means = [
        {name: statistics.fmean(values[seed]) for name, values in zip(("ours", "theirs"), read, strict=True)}
        for seed in seeds
    ]
    return [mean["ours"] - mean["theirs"] for mean in means], kls, means


def whole(values: dict[int, list[Any]]) -> dict[int, list[Any]]:
    """Those seeds that have as many values as any: a mean over settings is one over the same settings for each seed."""
    full = max(map(len, values.values()), default=0)
    return {seed: each for seed, each in values.items() if len(each) == full}


def select(results: Sequence[dict[str, Any]], keep: Callable[[dict[str, Any]], bool]) -> Paths:
    """The paths of the finished runs that `keep` says yes to."""
    paths: Paths = {}
    for result in results:
        if "error" not in result and keep(result):
            paths.setdefault(result["setting"], {})[result["seed"]] = result["points"]
    return paths
