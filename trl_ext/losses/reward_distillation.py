"""
Distillation of reward models into the policy, Fisch et al., https://huggingface.co/papers/2405.19316: d-DPO with one reward
model, e-DPO with an ensemble.

    L = (h - beta * delta)^2,   h = score_chosen - score_rejected

delta (nats) is the chosen minus the rejected log-ratio of policy to reference. The gap of the policy's implicit rewards is drawn
to that of the explicit ones, so scores have to be in the unit of the reward: Bradley-Terry logits. Which completion is called
chosen is of no account: swapped, with their scores, they give the same loss. Of several reward models, "mean" takes h for
the mean of their gaps (e-DPO), and "min" takes the smallest of the squares: the policy may agree with whichever is nearest. That
stands for p-DPO, which is pessimistic over a set of reward models and has a pull to the reference besides, and whose exact form is
not known here. How sure this is: `evidence` below.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, refuse_values
from .batch import PreferenceBatch
from .registry import register_loss


@register_loss("reward_distillation", aliases=["d_dpo", "e_dpo"])
@dataclass(frozen=True)
class RewardDistillationLoss(Loss):
    """
    Squared distance of the implicit reward gap to that of one or several reward models.

    Args:
        combine (`str`, *optional*, defaults to `"mean"`):
            Where scores are lists, one number per reward model: `"mean"`, the mean of their gaps is what is asked for; or
            `"min"`, the gap of the reward model that is nearest to the policy.
    """

    paper: ClassVar[str] = "2405.19316"
    title: ClassVar[str] = "Robust Preference Optimization through Reward Model Distillation"
    citation: ClassVar[str] = """\
@article{fisch2024robust,
    title        = {{Robust Preference Optimization through Reward Model Distillation}},
    author       = {Adam Fisch and Jacob Eisenstein and Vicky Zayats and Alekh Agarwal and Ahmad Beirami and Chirag Nagpal and Pete Shaw and Jonathan Berant},
    year         = 2024,
    eprint       = {arXiv:2405.19316},
}"""
    evidence: ClassVar[str] = (
        "The square is recalled, and a review calls the method equal to soft labels, which would be another form; the smallest square "
        "over reward models is ours, as the nearest that is known to p-DPO."
    )
    columns: ClassVar[tuple[str, ...]] = ("score_chosen", "score_rejected")
    takes_lists: ClassVar[bool] = True

    combine: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        if self.combine not in ("mean", "min"):
            raise ValueError(
                f"reward_distillation: `combine={self.combine!r}` is unknown; choose one of ['mean', 'min']."
            )

    def gaps(self, batch: PreferenceBatch) -> torch.Tensor:
        """Reward of the chosen minus that of the rejected completion under each of `M` reward models, shape `(B, M)`."""
        chosen, rejected = (batch.column(name, lists=True) for name in self.columns)
        gaps = (chosen - rejected).detach()
        gaps = gaps.view(len(gaps), -1)
        refuse_values(~gaps.isfinite().all(dim=1), f"reward_distillation: {list(self.columns)} must be finite.")
        return gaps

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        gaps, implicit = self.gaps(batch), batch.beta * batch.delta
        if self.combine == "mean":
            return (gaps.mean(dim=1).to(implicit.dtype) - implicit) ** 2
        squares = (gaps.to(implicit.dtype) - implicit.unsqueeze(1)) ** 2
        return squares.min(dim=1).values  # of equal ones the first, not the mean of their gradients, which may be 0

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        gaps = self.gaps(batch)
        metrics = {"reward_gap/wanted": gaps.mean()}
        if gaps.size(1) > 1:
            metrics["reward_gap/disagreement"] = (gaps.amax(dim=1) - gaps.amin(dim=1)).mean()
        return metrics
