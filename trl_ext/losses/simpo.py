"""
Simple preference optimisation without a reference (SimPO), Meng, Xia, Chen, https://huggingface.co/papers/2405.14734.

    L = -log sigmoid(beta * (avg_w - avg_l - gamma_beta_ratio))

avg is a completion's log-probability per token under the policy, in nats; lengths are clamped to 1. gamma_beta_ratio is the
margin asked for, in nats per token: gamma, the margin in units of the reward, divided by beta. There is no reference model.
Averages are small, so `beta` is large: the authors' default is 2, that of the config here 0.1.
Formula: the authors' code, whose default of `gamma_beta_ratio` is 0.25.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss, averages
from .batch import PreferenceBatch
from .bias_variance import present
from .registry import register_loss


@register_loss("simpo")
@dataclass(frozen=True)
class SimPOLoss(Loss):
    """
    DPO on log-probabilities per token, with a margin in place of the reference.

    Args:
        gamma_beta_ratio (`float`, *optional*, defaults to `0.5`):
            Margin asked for, at least 0, in nats per token.
    """

    paper: ClassVar[str] = "2405.14734"
    title: ClassVar[str] = "SimPO: Simple Preference Optimization with a Reference-Free Reward"
    citation: ClassVar[str] = """\
@inproceedings{meng2024simpo,
    title        = {{SimPO: Simple Preference Optimization with a Reference-Free Reward}},
    author       = {Yu Meng and Mengzhou Xia and Danqi Chen},
    year         = 2024,
    booktitle    = {Advances in Neural Information Processing Systems},
}"""
    reads: ClassVar[frozenset[str]] = frozenset()

    gamma_beta_ratio: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.gamma_beta_ratio < 0:
            raise ValueError(
                f"simpo: `gamma_beta_ratio={self.gamma_beta_ratio}` must be at least 0 (0 asks for no margin)."
            )

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected = averages(batch)
        return -F.logsigmoid(batch.beta * (chosen - rejected - self.gamma_beta_ratio))

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        chosen, rejected = (average.detach() for average in averages(batch))
        values = {
            "per_token/margins": batch.beta * (chosen - rejected),
            "per_token/accuracies": (chosen > rejected).float(),
        }
        return {name: value.masked_fill(~present(batch), torch.nan) for name, value in values.items()}
