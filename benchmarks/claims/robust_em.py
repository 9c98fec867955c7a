"""RE-PO (2509.24159): expectation-maximisation finds out how reliable annotators are, and trains a better policy than DPO."""

import random
import statistics
from typing import Any

from datasets import Dataset

from . import data
from .frame import Claim, Run, Side
from .judging import Row, row, unmeasured, whole
from .worlds import World


# How often each annotator's label is flipped
FLIPS = (0.0, 0.1, 0.2, 0.3, 0.45)
EM = "robust_em"


class RobustEM(Claim):
    name = "robust_em"
    paper = "2509.24159"
    text = (
        "`robust_em` recovers the reliability of five annotators who flip 0, 10, 20, 30 and 45 % of their labels, and its policy has more "
        "reward than DPO's."
    )
    sides = (
        Side(
            EM,
            tuple(
                {"loss_type": "robust_em", "beta": beta, "loss_kwargs": {"annotators": len(FLIPS), "rate": rate}}
                for beta in (0.3, 1.0)
                for rate in (0.1, 0.03)
            ),
        ),
        Side("DPO", tuple({"loss_type": "sigmoid", "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0))),
    )
    steps = 80

    def data(self, world: World, run: Run) -> Dataset:
        rows = data.labelled(world.groups(run.seed, self.scale.count(480)), run.seed)
        rng = random.Random(run.seed + 1)
        for each in rows:
            each["annotator_id"] = rng.randrange(len(FLIPS))
            if rng.random() < FLIPS[each["annotator_id"]]:
                each["chosen"], each["rejected"] = each["rejected"], each["chosen"]
        return data.pairs(rows, "annotator_id")

    def execute(self, world: World, run: Run) -> dict[str, Any]:
        steps = self.scale.count(self.steps)
        trained = world.train(self.data(world, run), self.settings(run), run.seed, steps, self.batch)
        state = trained.trainer._terms.state.get(EM)
        return {"points": trained.points, **({"reliability": state["reliability"].tolist()} if state else {})}

    def rows(self, results: list[dict[str, Any]]) -> list[Row]:
        estimates: dict[int, list[list[float]]] = {}
        for each in results:
            if "error" not in each and each["side"] == EM:
                estimates.setdefault(each["seed"], []).append(each["reliability"])
        estimates = whole(estimates)
        ranked, better = (
            "rank correlation of estimated and true reliability",
            "error beside that of the best single number",
        )
        if not estimates:
            return [unmeasured(self.name, measured, "no run finished") for measured in (ranked, better)]
        truth = [1 - flip for flip in FLIPS]
        orders, gains = [], []
        for found in estimates.values():  # of one seed: a mean over its settings, so that none is chosen
            orders.append(statistics.fmean(spearman(each, truth) for each in found))
            gains.append(
                statistics.fmean(
                    error([statistics.fmean(truth)] * len(truth), truth) - error(each, truth) for each in found
                )
            )
        means = [
            statistics.fmean(values)
            for values in zip(*(each for found in estimates.values() for each in found), strict=True)
        ]
        shown = ", ".join(f"{mean:.2f} ({true:.2f})" for mean, true in zip(means, truth, strict=True))
        return [
            row(self.name, f"{ranked}, mean over settings", orders, 0.3, f"estimated (true): {shown}"),
            row(
                self.name,
                f"{better}, mean over settings",
                gains,
                0.02,
                "mean absolute error; the single number is the true mean",
            ),
            self.against(results, "", EM, "DPO"),
        ]


def error(estimates: list[float], truth: list[float]) -> float:
    """Mean absolute error."""
    return statistics.fmean(abs(a - b) for a, b in zip(estimates, truth, strict=True))


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; 0 where all values are one."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    return statistics.correlation(*ranks) if len(set(a)) > 1 else 0.0
