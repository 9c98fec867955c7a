"""ADPO (2510.18913): soft targets withstand wrong labels better than DPO, conservative DPO and TRL's `robust`, groups more than pairs."""

from typing import Any

from datasets import Dataset

from . import data
from .frame import Claim, Run, Side
from .worlds import World


NOISE = {"no noise": 0.0, "20 % flipped": 0.2, "40 % flipped": 0.4}
# beta and the temperature of the targets; pairs and groups have the same
SOFT = ((0.3, 1.0), (1.0, 1.0), (0.3, 0.5))
# beta and the share of labels that is taken to be wrong
SMOOTH = ((0.3, 0.1), (1.0, 0.3), (0.3, 0.3))


class Anchored(Claim):
    name = "anchored"
    paper = "2510.18913"
    text = (
        "Under label noise of 0 to 40 %, `anchored` (targets from a reward model that is trained on the same noisy pairs) keeps more "
        "reward than hard labels, smoothed labels and TRL's `robust`; whole groups keep more than pairs."
    )
    seeds = 6
    conditions = tuple(NOISE)
    sides = (
        Side("anchored", tuple({"loss_type": "anchored", "beta": b, "loss_kwargs": {"beta_r": r}} for b, r in SOFT)),
        Side("DPO", tuple({"loss_type": "sigmoid", "beta": beta} for beta in (0.1, 0.3, 1.0))),
        Side(
            "conservative DPO",
            tuple({"loss_type": "anchored", "beta": b, "loss_kwargs": {"label_smoothing": e}} for b, e in SMOOTH),
        ),
        Side("robust", tuple({"loss_type": "robust", "beta": b, "label_smoothing": e} for b, e in SMOOTH)),
        Side(
            "anchored, groups",
            tuple(
                {"loss_type": "anchored", "beta": b, "pairing": "group", "loss_kwargs": {"beta_r": r}} for b, r in SOFT
            ),
        ),
    )

    def data(self, world: World, run: Run) -> Dataset:
        groups = world.groups(run.seed, self.scale.count(320))
        noise = NOISE[run.condition]
        rows = data.labelled(groups, run.seed, noise)
        if run.side in ("DPO", "conservative DPO", "robust"):
            return data.pairs(rows)
        # The reward model of these labels scores all four completions: twice the pairs of each group
        name = f"noise-{noise}-{run.seed}-{len(rows)}"
        rows = data.scored(world, name, rows, self.scale.count(120))
        if run.side == "anchored":
            return data.pairs(rows, "score_chosen", "score_rejected")
        return Dataset.from_list([as_group(group, number, rows) for number, group in enumerate(groups)])

    def execute(self, world: World, run: Run) -> dict[str, Any]:
        steps = self.scale.count(self.steps)
        # Groups of four: as many completions per step as with pairs
        batch = self.batch // 2 if run.side == "anchored, groups" else self.batch
        return {"points": world.train(self.data(world, run), self.settings(run), run.seed, steps, batch).points}

    def rows(self, results):
        return [
            self.against(results, condition, *sides)
            for condition in self.conditions
            for sides in (
                ("anchored", "DPO"),
                ("anchored", "conservative DPO"),
                ("anchored", "robust"),
                ("anchored, groups", "anchored"),
            )
        ]


def as_group(group: dict[str, Any], number: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A group with the reward model's scores, which its two pairs hold."""
    scores = [0.0] * len(group["completions"])
    for row in rows[number * len(data.TWOS) :][: len(data.TWOS)]:
        scores[row["first"]], scores[row["second"]] = row["score_chosen"], row["score_rejected"]
    return {"prompt": group["prompt"], "completions": group["completions"], "scores": scores}
