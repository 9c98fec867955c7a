"""
Iterative Nash policy optimisation (INPO), Zhang et al., https://huggingface.co/papers/2407.00617.

    h = (log pi(w) - log pi(l)) - tau / eta * (log pi_0(w) - log pi_0(l)) - (eta - tau) / eta * (log pi_t(w) - log pi_t(l))
    L = (h - 1 / (2 eta))^2

The squared loss around two references: pi_t, the policy that the round began with and that wrote the completions (the
trainer's reference model), and pi_0, the one that all rounds began with (columns `initial_chosen_logps`,
`initial_rejected_logps`). All log-probabilities are sums over tokens, in nats. tau = 0, or pi_0 = pi_t, is IPO around pi_t.
`beta` is not read. How sure this is: `evidence` below.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, refuse_values
from .batch import PreferenceBatch
from .registry import register_loss


@register_loss("inpo")
@dataclass(frozen=True)
class INPOLoss(Loss):
    """
    Squared distance of the log-ratio around two references to `1 / (2 eta)`.

    Args:
        eta (`float`, *optional*, defaults to `0.0075`):
            Strength of both references together, positive.
        tau (`float`, *optional*, defaults to `0.0025`):
            Strength of pi_0, in `[0, eta]`; pi_t has the rest, `eta - tau`.
    """

    paper: ClassVar[str] = "2407.00617"
    title: ClassVar[str] = (
        "Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning"
    )
    citation: ClassVar[str] = """\
@article{zhang2024inpo,
    title        = {{Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning}},
    author       = {Yuheng Zhang and Dian Yu and Baolin Peng and Linfeng Song and Ye Tian and Mingyue Huo and Nan Jiang and Haitao Mi and Dong Yu},
    year         = 2024,
    eprint       = {arXiv:2407.00617},
}"""
    evidence: ClassVar[str] = (
        "The formula is from code of a third party, consistent with what is recalled of the paper's Eqs. 9 and 10; the defaults are "
        "recalled."
    )
    columns: ClassVar[tuple[str, ...]] = ("initial_chosen_logps", "initial_rejected_logps")

    eta: float = 0.0075
    tau: float = 0.0025

    def __post_init__(self):
        super().__post_init__()
        if self.eta <= 0:
            raise ValueError(f"inpo: `eta={self.eta}` must be positive.")
        if not 0 <= self.tau <= self.eta:
            raise ValueError(f"inpo: `tau={self.tau}` must lie in [0, eta={self.eta}].")

    @property
    def reads_beta(self) -> bool:
        return False

    def margin(self, batch: PreferenceBatch) -> torch.Tensor:
        """h, shape `(B,)`, nats."""
        initial = batch.column("initial_chosen_logps") - batch.column("initial_rejected_logps")
        refuse_values(~initial.isfinite(), f"inpo: {list(self.columns)} must be finite.")
        delta = batch.delta
        # (pi - pi_t) plus the share tau / eta of (pi_t - pi_0): no difference of large sums
        moved = batch.ref_chosen_logps - batch.ref_rejected_logps - initial.detach().to(delta.dtype)
        return delta + self.tau / self.eta * moved

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        return (self.margin(batch) - 1 / (2 * self.eta)) ** 2

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        return {"margin/mean": self.margin(batch).detach().mean()}
