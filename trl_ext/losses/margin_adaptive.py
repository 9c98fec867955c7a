"""
Margin-adaptive DPO (MADPO), Rho, https://huggingface.co/papers/2510.05342.

With h = score_chosen - score_rejected the margin of a frozen reward model in Bradley-Terry logits, signed by the label:

    c(m) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * exp(lmbda * (m - tau)))
    w(h) = sigmoid(c(|h|) * h) / sigmoid(h)   if h > -tau,   else 1
    L    = -w(h) * log sigmoid(beta * delta)

The weight makes the target sigmoid(c h) where DPO's is sigmoid(h): c > 1 amplifies margins below tau, c < 1 damps those
above; pairs whose label the reward model contradicts (-tau < h < 0) are damped most. c(tau) = 1, so w is continuous at
h = tau and -tau; w(0) = 1. Rescaling the scores changes the method. No gradient goes through w.
Formula and defaults: the authors' code (v1).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss, refuse_values, sigmoid
from .batch import PreferenceBatch
from .registry import register_loss


@register_loss("margin_adaptive", aliases=["madpo"])
@dataclass(frozen=True)
class MarginAdaptiveLoss(Loss):
    """
    DPO with a weight per pair, from the margin that a reward model trained on the same preferences gives the pair.

    Args:
        c_min (`float`, *optional*, defaults to `0.5`):
            Limit of the factor that large margins are multiplied by, in `(0, 1)`.
        c_max (`float`, *optional*, defaults to `2.0`):
            Limit of the factor that small margins are multiplied by, above 1.
        lmbda (`float`, *optional*, defaults to `1.0`):
            How sharply the factor falls with the margin, positive, in 1 / logits.
        tau (`float`, *optional*, defaults to `2.0`):
            Margin at which the factor is 1, positive, in logits. The paper's best run has `log(999) = 6.907`.
    """

    paper: ClassVar[str] = "2510.05342"
    title: ClassVar[str] = (
        "Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference Optimization"
    )
    citation: ClassVar[str] = """\
@article{rho2025margin,
    title        = {{Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference Optimization}},
    author       = {Hyung Gyu Rho},
    year         = 2025,
    eprint       = {arXiv:2510.05342},
}"""
    columns: ClassVar[tuple[str, ...]] = ("score_chosen", "score_rejected")

    c_min: float = 0.5
    c_max: float = 2.0
    lmbda: float = 1.0
    tau: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.c_min < 1:
            raise ValueError(f"margin_adaptive: `c_min={self.c_min}` must lie in (0, 1).")
        if self.c_max <= 1:
            raise ValueError(f"margin_adaptive: `c_max={self.c_max}` must be above 1.")
        if self.lmbda <= 0:
            raise ValueError(f"margin_adaptive: `lmbda={self.lmbda}` must be positive.")
        if self.tau <= 0:
            raise ValueError(f"margin_adaptive: `tau={self.tau}` must be positive.")

    def weight(self, margin: torch.Tensor) -> torch.Tensor:
        """w(h) for margins in logits, shape `(B,)`; detached."""
        # Below -tau the ratio would grow like exp((1 - c) |h|); it is not used there, so it is not computed there
        h = margin.detach().clamp(min=-self.tau)
        shift = math.log((self.c_max - 1) / (1 - self.c_min))
        c = self.c_min + (self.c_max - self.c_min) * torch.sigmoid(-(self.lmbda * (h.abs() - self.tau) + shift))
        weight = torch.exp(F.logsigmoid(c * h) - F.logsigmoid(h))
        return torch.where(margin > -self.tau, weight, torch.ones_like(weight))

    def _weight(self, batch: PreferenceBatch) -> torch.Tensor:
        margin = batch.column("score_chosen") - batch.column("score_rejected")
        refuse_values(margin.isnan(), f"margin_adaptive: {list(self.columns)} must be numbers.")
        return self.weight(margin)

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        return self._weight(batch).to(batch.delta.dtype) * sigmoid(batch)

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        weight = self._weight(batch)
        return {"weight/mean": weight.mean(), "weight/min": weight.min(), "weight/max": weight.max()}
