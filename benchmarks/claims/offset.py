"""ODPO (2402.10571): with few pairs, an offset that grows with the margin gives more reward at the same KL than DPO."""

from datasets import Dataset

from .frame import Claim, Run, Side
from .worlds import World


class Offset(Claim):
    name = "offset"
    paper = "2402.10571"
    text = "With few pairs, the reward-KL frontier of `offset` lies above that of DPO."
    conditions = ("96 pairs", "640 pairs")
    sides = (
        Side(
            "offset",
            tuple(
                {"loss_type": "offset", "beta": beta, "loss_kwargs": {"alpha": alpha}}
                for beta in (0.3, 1.0)
                for alpha in (0.5, 1.0)
            ),
        ),
        Side("DPO", tuple({"loss_type": "sigmoid", "beta": beta} for beta in (0.1, 0.3, 1.0, 3.0))),
    )

    def data(self, world: World, run: Run) -> Dataset:
        """As in the paper: completions of the start, the one with the higher score is chosen, ties are dropped."""
        count = self.scale.count(int(run.condition.split()[0]))
        rows = []
        for group in world.groups(run.seed, self.scale.count(320)):
            for first, second in ((0, 1), (2, 3)):
                pair = sorted((first, second), key=lambda i: -group["scores"][i])
                high, low = (group["scores"][i] for i in pair)
                if high > low:
                    chosen, rejected = (group["completions"][i] for i in pair)
                    rows.append({"prompt": group["prompt"], "chosen": chosen, "rejected": rejected, "score_chosen": high, "score_rejected": low})  # fmt: skip
        return Dataset.from_list(rows[:count])
