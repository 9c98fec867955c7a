"""
The objective of the Eurus reward model, Yuan et al., https://huggingface.co/papers/2404.02078, on the policy's implicit rewards.

    L = -log sigmoid(r_w - r_l) + absolute_weight * (-log sigmoid(r_w) - log sigmoid(-r_l)),   r = beta * c

c is a completion's log-ratio of policy to reference, summed over tokens, in nats. Beside the gap, the rewards themselves are
pushed: that of the chosen completion above 0, that of the rejected one below, which plain DPO does not ask for (it often lets
both fall). The paper adds the terms in brackets on the pairs of its own data alone, and trains a reward model with them, not a
policy. How sure this is: `evidence` below.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss, sigmoid
from .batch import PreferenceBatch
from .registry import register_loss


@register_loss("eurus")
@dataclass(frozen=True)
class EurusLoss(Loss):
    """
    DPO, and the sign of each completion's own reward.

    Args:
        absolute_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the terms in each reward by itself, at least 0. At 0 the loss is DPO.
    """

    paper: ClassVar[str] = "2404.02078"
    title: ClassVar[str] = "Advancing LLM Reasoning Generalists with Preference Trees"
    citation: ClassVar[str] = """\
@article{yuan2024advancing,
    title        = {{Advancing LLM Reasoning Generalists with Preference Trees}},
    author       = {Lifan Yuan and Ganqu Cui and Hanbin Wang and Ning Ding and Xingyao Wang and Jia Deng and Boji Shan and Huimin Chen and Ruobing Xie and Yankai Lin and Zhenghao Liu and Bowen Zhou and Hao Peng and Zhiyuan Liu and Maosong Sun},
    year         = 2024,
    eprint       = {arXiv:2404.02078},
}"""
    evidence: ClassVar[str] = (
        "The objective is the paper's, for a reward model; as a loss of the policy's implicit rewards, and on all pairs, it is ours."
    )

    absolute_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.absolute_weight < 0:
            raise ValueError(f"eurus: `absolute_weight={self.absolute_weight}` must be at least 0 (0 is DPO).")

    def absolute(self, batch: PreferenceBatch) -> torch.Tensor:
        """`-log sigmoid(r_w) - log sigmoid(-r_l)`, shape `(B,)`."""
        return -F.logsigmoid(batch.beta * batch.chosen_logratios) - F.logsigmoid(
            -batch.beta * batch.rejected_logratios
        )

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        return sigmoid(batch) + self.absolute_weight * self.absolute(batch)

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        return {"absolute/mean": self.absolute(batch).detach().mean()}
