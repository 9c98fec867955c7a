"""iLR-DPO (2406.11817): in rounds under a judge that likes long answers, answers grow; with a price per token they do not."""

from typing import Any

from . import data
from .frame import Claim, Run, Side
from .judging import Row, row, select, unmeasured, whole
from .worlds import World


ROUNDS = 3
# What the judge gives for each token, in logits; the true reward gives nothing
LIKING = 0.1


class LengthRegularized(Claim):
    name = "length_regularized"
    paper = "2406.11817"
    text = (
        "In three rounds under a judge that adds 0.1 logits per token to the true reward, answers of plain DPO grow; those of `length_regularized` "
        "are shorter at equal KL, and no worse."
    )
    sides = (
        Side(
            "length_regularized",
            tuple(
                {"loss_type": "length_regularized", "beta": beta, "loss_kwargs": {"alpha": alpha}}
                for beta, alpha in ((0.3, 0.05), (0.3, 0.1), (1.0, 0.1))
            ),
        ),
        Side("plain DPO", tuple({"loss_type": "sigmoid", "beta": beta} for beta in (0.1, 0.3, 1.0))),
    )
    steps = 20  # of each round
    drawn = "length"

    def execute(self, world: World, run: Run) -> dict[str, Any]:
        policy, points = world.start, [{"step": 0, **world.kept_start()}]
        for number in range(ROUNDS):
            seed = 100 * run.seed + number
            # The policy of the round writes, and is the round's reference
            groups = world.groups(seed, self.scale.count(128), model=policy if number else None)
            for group in groups:
                group["scores"] = [
                    score + LIKING * world.tokens_of(text)
                    for score, text in zip(group["scores"], group["completions"], strict=True)
                ]
            dataset = data.pairs(data.labelled(groups, seed))
            steps = self.scale.count(self.steps)
            trained = world.train(
                dataset, self.gently(world, run), seed, steps, self.batch, model=world.clone(policy), marks=(1.0,)
            )
            points += [{**point, "step": point["step"] + number * steps} for point in trained.points]
            policy = world.clone(trained.trainer.model)
        return {"points": points}

    def rows(self, results: list[dict[str, Any]]) -> list[Row]:
        ours, theirs = (side.name for side in self.sides)
        grown: dict[int, list[float]] = {}
        for seeds in select(results, lambda each: each["side"] == theirs).values():
            for seed, points in seeds.items():
                grown.setdefault(seed, []).append(points[-1]["length"] - points[0]["length"])
        grown = whole(grown)
        measured = "tokens by which answers grow in three rounds of plain DPO, mean over settings"
        growth = (
            row(self.name, measured, [sum(each) / len(each) for each in grown.values()], 1.0)
            if grown
            else unmeasured(self.name, measured, "no run finished")
        )
        return [
            growth,
            self.against(results, "", ours, theirs, "length", "tokens saved", 1.0),
            self.against(results, "", ours, theirs),
        ]
