"""
DPO that asks for no more than a given reward gap:

    L = -log sigmoid(min(beta * delta, cap))

with `delta` the chosen less the rejected log-ratio, in nats. A pair whose gap has reached the cap has no gradient any more. An
example of a loss in a package of its own; no paper stands behind it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trl_ext import PreferenceBatch
from trl_ext.losses import Loss


@dataclass(frozen=True)
class CappedLoss(Loss):
    """
    Args:
        cap (`float`, *optional*, defaults to `2.0`):
            Reward gap that is enough, positive.
    """

    cap: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if not self.cap > 0:
            raise ValueError(f"capped: `cap={self.cap}` must be positive.")

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        return -F.logsigmoid((batch.beta * batch.delta).clamp(max=self.cap))

    def metrics(self, batch: PreferenceBatch) -> dict[str, torch.Tensor]:
        return {"capped/share": (batch.beta * batch.delta.detach() >= self.cap).float()}
