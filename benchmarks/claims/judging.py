"""How runs become a verdict: reward at equal KL, settings chosen without the seed they are judged on, intervals, one rule."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

SEEDS = 3  # that a verdict needs
RULE = (
    "Rule. Each effect is written so that a positive one agrees with the paper, and its interval is the 95 % interval of Student's t over "
    "seeds, of paired differences. `holds`: the whole interval is above 0. `does not`: the whole interval is below the smallest effect worth "
    "naming. `undecided`: neither, or fewer than three seeds. No correction for the number of rows: of twenty rows in which nothing is true, one "
    "has an interval without 0."
)
SEARCH = (
    "Comparisons. Every loss has the same number of settings, over beta and its own scale. A run is a path of (KL, reward) points, "
    "interpolated in the square root of KL, and is read at a quarter, a half and all of the largest KL that at least half of the settings "
    "of either loss reach with every seed. At each of these the setting of a loss is, for one seed, the one with the best mean reward over the "
    "other seeds: no seed chooses for itself. The figure is the mean over the three KLs."
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its interval, both in the unit of the effect."""

    mean: float
    low: float
    high: float
    count: int


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


def interval(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of Student's t; without bounds for a single value."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, -math.inf, math.inf, count)
    t = T95[count - 2] if count - 2 < len(T95) else 1.96 + 2.6 / (count - 1)
    reach = t * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - reach, mean + reach, count)


def verdict(low: float, high: float, smallest: float = 0.0) -> str:
    """`holds`, `does not` or `undecided`, by [`RULE`]."""
    if math.isnan(low) or math.isnan(high):
        return "undecided"
    return "holds" if low > 0 else "does not" if high < smallest else "undecided"


def row(claim: str, measured: str, values: Sequence[float], smallest: float, note: str = "") -> Row:
    """The row of an effect that was measured once per seed."""
    found = interval(values)
    # Two values that lie close together by chance have an interval of almost no width
    decided = verdict(found.low, found.high, smallest) if found.count >= SEEDS else "undecided"
    return Row(claim, measured, found.mean, found.low, found.high, smallest, decided, note)


def unmeasured(claim: str, measured: str, why: str) -> Row:
    """The row of what could not be measured."""
    return Row(claim, measured, math.nan, math.nan, math.nan, math.nan, "undecided", why)


def at_kl(points: Sequence[dict[str, Any]], kl: float, metric: str = "reward") -> float | None:
    """A metric of a path at a KL, linear in the square root of KL between its points; `None` beyond its end."""
    path = sorted((max(point["kl"], 0.0), point[metric]) for point in points)
    if path[-1][0] < kl:
        return None
    roots, values = zip(*((math.sqrt(at), value) for at, value in path), strict=True)
    return float(np.interp(math.sqrt(kl), roots, values))


# The runs of one side: by setting, by seed, the points of the path
Paths = dict[int, dict[int, list[dict[str, Any]]]]


def common_kl(*sides: Paths) -> float:
    """The largest KL that, of each side, at least half of the settings reach with every seed."""
    reaches = [
        sorted(min(max(point["kl"] for point in points) for points in seeds.values()) for seeds in side.values())
        for side in sides
    ]
    return min(reach[len(reach) // 2] for reach in reaches)


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


def compare(ours: Paths, theirs: Paths, metric: str = "reward") -> tuple[list[float], float, list[dict[str, float]]]:
    """
    Differences at equal KL, one per seed: `metric` of ours less that of theirs, under settings that are chosen by the reward.

    Returns:
        The differences, the largest KL, and what each seed's difference is made of.

    Raises:
        `ValueError`: Where the sides have no seed in common with all settings.
    """
    finished = [set(each) for side in (ours, theirs) for each in side.values()]
    seeds = sorted(set.intersection(*finished)) if ours and theirs else []
    if not seeds:
        raise ValueError("no seed has finished with all settings of both losses")
    top = common_kl(
        *({at: {seed: each[seed] for seed in seeds} for at, each in side.items()} for side in (ours, theirs))
    )
    totals: dict[int, list[tuple[float, float]]] = {seed: [] for seed in seeds}
    for kl in (top / 4, top / 2, top):
        read = []
        for side in (ours, theirs):
            rewards = {at: {seed: at_kl(each[seed], kl) for seed in seeds} for at, each in side.items()}
            picks = chosen(rewards, seeds)
            read.append({seed: at_kl(side[picks[seed]][seed], kl, metric) for seed in seeds})
        for seed in seeds:
            totals[seed].append((read[0][seed], read[1][seed]))
    means = [
        {"ours": statistics.fmean(a for a, _ in each), "theirs": statistics.fmean(b for _, b in each)}
        for each in totals.values()
    ]
    return [mean["ours"] - mean["theirs"] for mean in means], top, means


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
