"""MADPO (2510.05342): weights from a reward model of the same pairs beat DPO, IPO and beta-DPO on good, mixed and bad data."""

import math
import random

from datasets import Dataset

from . import data
from .frame import Claim, Run, Side
from .worlds import World


# Share of pairs whose two texts do not both come from the start
OFF_POLICY = {"good data": 0.0, "mixed data": 0.5, "bad data": 1.0}
TAU = math.log(999)  # of the paper's best runs


class MarginAdaptive(Claim):
    name = "margin_adaptive"
    paper = "2510.05342"
    text = "`margin_adaptive` has more reward than DPO, IPO and `beta_dpo`, whether data is good, mixed or bad."
    seeds = 5
    conditions = tuple(OFF_POLICY)
    sides = (
        Side(
            "margin_adaptive",
            tuple(
                {"loss_type": "margin_adaptive", "beta": beta, "loss_kwargs": {"c_max": c, "c_min": 1 / c, "tau": TAU}}
                for beta, c in ((0.3, 2.0), (0.3, 4.0), (1.0, 4.0))
            ),
        ),
        Side("DPO", tuple({"loss_type": "sigmoid", "beta": beta} for beta in (0.1, 0.3, 1.0))),
        Side("IPO", tuple({"loss_type": "ipo", "beta": beta} for beta in (1.0, 3.0, 10.0))),
        Side(
            "beta_dpo",
            tuple(
                {"loss_type": "beta_dpo", "beta": beta, "loss_kwargs": {"a": a}}
                for beta, a in ((0.3, 0.6), (1.0, 0.6), (0.3, 0.2))
            ),
        ),
    )

    def data(self, world: World, run: Run) -> Dataset:
        """As in the paper: of bad data, the better of four completions stand beside texts that no policy wrote."""
        groups = world.groups(run.seed, self.scale.count(320))
        rng = random.Random(run.seed)
        prompts = [group["prompt"] for group in groups for _ in range(2)]
        texts = world.foreign(prompts, run.seed)
        scores = world.score(prompts, texts)
        mixed = []
        for number, group in enumerate(groups):
            if rng.random() < OFF_POLICY[run.condition]:
                own = sorted(zip(group["scores"], group["completions"], strict=True), key=lambda each: -each[0])[:2]
                other = list(zip(scores, texts, strict=True))[2 * number :][:2]
                four = [own[0], other[0], own[1], other[1]]
                group = {**group, "scores": [each[0] for each in four], "completions": [each[1] for each in four]}
            mixed.append(group)
        rows = data.labelled(mixed, run.seed)
        if run.side != "margin_adaptive":
            return data.pairs(rows)
        name = f"{run.condition.split()[0]}-{run.seed}-{len(rows)}"
        return data.pairs(data.scored(world, name, rows, self.scale.count(120)), "score_chosen", "score_rejected")
