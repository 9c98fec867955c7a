"""
Length-regularised DPO: iterative (iLR-DPO), Liu et al., https://huggingface.co/papers/2406.11817, and R-DPO, Park et
al., https://huggingface.co/papers/2403.19159.

    L = -log sigmoid(beta * delta + alpha * (n_chosen - n_rejected))

n counts completion tokens after truncation, under the same mask as the log-probs (sums, in nats). alpha (1 / tokens)
stands outside beta. The sign is a plus: maximising E[r - alpha n] - beta KL gives r = beta * log-ratio + alpha * n, so a
longer chosen completion needs, and gets, less push. A minus, seen in several codes, rewards length.
alpha * 100 tokens should be of order 1. How sure this is: `evidence` below.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss
from .batch import PreferenceBatch
from .registry import register_loss


@register_loss("length_regularized", aliases=["ilr_dpo", "r_dpo"])
@dataclass(frozen=True)
class LengthRegularizedLoss(Loss):
    """
    DPO with a margin for the difference in length.

    Args:
        alpha (`float`, *optional*, defaults to `0.02`):
            Price of each token, at least 0, in units of the reward. At 0 the loss is DPO.
    """

    paper: ClassVar[str] = "2406.11817, 2403.19159"
    title: ClassVar[str] = (
        "Iterative Length-Regularized Direct Preference Optimization: A Case Study on Improving 7B Language Models to GPT-4 Level"
    )
    citation: ClassVar[str] = """\
@article{liu2024iterative,
    title        = {{Iterative Length-Regularized Direct Preference Optimization: A Case Study on Improving 7B Language Models to GPT-4 Level}},
    author       = {Jie Liu and Zhanhui Zhou and Jiaheng Liu and Xingyuan Bu and Chao Yang and Han-Sen Zhong and Wanli Ouyang},
    year         = 2024,
    eprint       = {arXiv:2406.11817},
}"""
    evidence: ClassVar[str] = (
        "R-DPO's Eq. 9 as code of third parties has it; that iLR-DPO is the same with each round's reference is recalled and derived, "
        "the default of `alpha` weakly recalled."
    )

    alpha: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"length_regularized: `alpha={self.alpha}` must be at least 0 (0 is DPO).")

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        gap = (batch.chosen_lengths - batch.rejected_lengths).to(batch.delta.dtype)
        return -F.logsigmoid(batch.beta * batch.delta + self.alpha * gap)

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        gap = (batch.chosen_lengths - batch.rejected_lengths).float().mean()
        return {"length_gap/mean": gap, "length_margin/mean": self.alpha * gap}
