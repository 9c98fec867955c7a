"""What the runs of several seeds say: rows of the table, and the sentences under it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trl_ext.demo import BASELINE
from trl_ext.demo.equal_kl import SHARES, at_equal_kl, common_kl
from trl_ext.metrics.intervals import student_interval


NAMES = {"reward": "true reward", "accuracy": "held-out pairs ranked right"}
# Below this nothing has moved, and no path can be read
SMALLEST_KL = 1e-6


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval of Student's t."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, and 0 where nothing can be said."""
        return (self.low > 0) - (self.high < 0)

    @property
    def reach(self) -> float:
        return (self.high - self.low) / 2


def estimate(values: Sequence[float]) -> Estimate:
    return Estimate(*student_interval(values))


@dataclass(frozen=True)
class Judged:
    """
    Losses that were trained on the same pairs, compared.

    Args:
        data (`str`): Which pairs.
        metric (`str`): `"reward"`, or `"accuracy"` where the reward is unknown.
        baseline (`str`): The loss that the others are compared with.
        seeds (`list[int]`): That every loss was trained with.
        kl (`float`): The largest KL that every run reaches, nats.
        nearest (`str`): The loss that ends there.
        rows (`list[dict]`): One per loss. Of several seeds: `at_equal_kl`, `difference` and `end_difference` to the baseline,
            `gain` over the start, [`Estimate`] each, `None` where there is none.
    """

    data: str
    metric: str
    baseline: str
    seeds: list[int]
    kl: float
    nearest: str
    rows: list[dict[str, Any]]

    @property
    def kls(self) -> str:
        """Where the paths are read."""
        first, second, third = (f"{share * self.kl:.2g}" for share in SHARES)
        return f"{first}, {second} and {third}"


def judge(runs: list[dict[str, Any]], metric: str) -> Judged:
    """
    Compare the runs of one kind of pairs.

    Args:
        runs (`list[dict]`): `loss`, `data`, `seed` and `points` of each, the first point the start; each loss with the same seeds.
        metric (`str`): What the points are compared in.
    """
    paths: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for run in runs:
        paths.setdefault(run["loss"], {})[run["seed"]] = run["points"]
    baseline = BASELINE if BASELINE in paths else next(iter(paths))
    seeds = sorted(paths[baseline])
    reached = {name: common_kl(each.values()) for name, each in paths.items()}
    nearest = min(reached, key=reached.get)
    kl = reached[nearest]
    values = {
        name: {seed: at_equal_kl(each[seed], kl, metric) if kl > SMALLEST_KL else math.nan for seed in seeds}
        for name, each in paths.items()
    }
    rows = []
    for name, each in paths.items():
        row: dict[str, Any] = {"loss": name, "data": runs[0]["data"], "seeds": len(seeds)}
        ends = {seed: each[seed][-1][metric] for seed in seeds}
        row["end"], row["end_kl"] = (estimate([each[seed][-1][key] for seed in seeds]) for key in (metric, "kl"))
        row["length"] = fmean(each[seed][-1]["length"] for seed in seeds)
        row["at_equal_kl"] = row["difference"] = row["gain"] = row["end_difference"] = None
        if kl > SMALLEST_KL:
            row["at_equal_kl"] = estimate([values[name][seed] for seed in seeds])
            row["gain"] = estimate([values[name][seed] - each[seed][0][metric] for seed in seeds])
        if name != baseline:
            row["end_difference"] = estimate([ends[seed] - paths[baseline][seed][-1][metric] for seed in seeds])
            if kl > SMALLEST_KL:
                row["difference"] = estimate([values[name][seed] - values[baseline][seed] for seed in seeds])
        rows.append(row)
    return Judged(runs[0]["data"], metric, baseline, seeds, kl, nearest, rows)


def sentence(judged: Judged) -> str:
    """What one sees in the numbers, with their intervals; where they show nothing, it says so."""
    if judged.kl <= SMALLEST_KL:
        return f"At equal KL nothing can be said: {judged.nearest} has not moved the model. Train longer: --max_steps."
    if len(judged.seeds) < 2:
        return "One seed has no interval: nothing can be said of differences between losses. Train more: --seeds 5."
    what = NAMES[judged.metric]
    said = [*_gains(judged, what), *_differences(judged, what), *_contradictions(judged, what)]
    return " ".join([*said, f"In brackets: 95 % intervals over {len(judged.seeds)} seeds."])


def _gains(judged: Judged, what: str) -> list[str]:
    found = _by_sign(judged.rows, "gain")
    start = f"At KLs of {judged.kls} nats"
    if len(found[1]) == len(judged.rows) > 1:
        return [f"{start} every loss has more {what} than the start."]
    said = [f"{start} more {what} than the start: {', '.join(found[1])}."] if found[1] else []
    said += [f"{start} less {what} than the start: {', '.join(found[-1])}."] if found[-1] else []
    unclear = f"{start} it cannot be said whether there is more {what} than at the start: {', '.join(found[0])}."
    return said + ([unclear] if found[0] else [])


def _differences(judged: Judged, what: str) -> list[str]:
    others = [row for row in judged.rows if row["loss"] != judged.baseline]
    found = _by_sign(others, "difference")
    name = judged.baseline
    said = [f"At equal KL more than {name}: {', '.join(found[1])}."] if found[1] else []
    said += [f"At equal KL less than {name}: {', '.join(found[-1])}."] if found[-1] else []
    if found[0]:
        holds = "the interval holds 0" if len(found[0]) == 1 else "the intervals hold 0"
        said.append(f"At equal KL no difference to {name} is shown, {holds}: {', '.join(found[0])}.")
    return said


def _contradictions(judged: Judged, what: str) -> list[str]:
    """Losses whose end says another thing than equal KL does."""
    (baseline,) = (row for row in judged.rows if row["loss"] == judged.baseline)
    found = []
    for row in judged.rows:
        if row["loss"] == judged.baseline or row["end_difference"].sign in (0, row["difference"].sign):
            continue
        ends = "more" if row["end_difference"].sign > 0 else "less"
        but = "which equal KL does not show" if row["difference"].sign == 0 else "and equal KL shows the opposite"
        found.append(
            f"At the end {row['loss']} has {ends} {what} than {judged.baseline}, {_figure(row['end_difference'])}, {but}: its KL is then "
            f"{row['end_kl'].mean:.2g}, that of {judged.baseline} {baseline['end_kl'].mean:.2g}."
        )
    return found


def _by_sign(rows: list[dict[str, Any]], key: str) -> dict[int, list[str]]:
    return {
        sign: [f"{row['loss']} {_figure(row[key])}" for row in rows if row[key].sign == sign] for sign in (1, -1, 0)
    }


def _figure(found: Estimate) -> str:
    return f"{found.mean:+.2f} [{found.low:.2f}, {found.high:.2f}]"
