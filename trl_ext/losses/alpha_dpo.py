"""
SimPO with a margin of each pair's own (AlphaDPO), Wu et al., https://huggingface.co/papers/2410.10148.

    p = log pi(w) / n_w - log pi(l) / n_l          d = p - (log ref(w) / n_w - log ref(l) / n_l)
    m = gamma_beta_ratio + alpha * (d - mean) / std
    L = -log sigmoid(beta * (p - m))

Everything is per token: n counts completion tokens after truncation, p and d are in nats per token, so `beta` is of the order of
2 to 10, as in SimPO. The reference enters through the margin m alone, through which no gradient flows. mean and std are running
values of the mean and standard deviation of d over all processes: they begin at 0, have no bias correction, and take the
micro-batch in before it is used, so margins spread more in the first micro-batches than later. Where std is 0 (equal gaps, or
never two pairs in a micro-batch) the pair's own part of the margin is 0. At alpha = 0 this is SimPO.
Author code (`scripts/dpo_trainer.py`); the guard for a standard deviation of 0 is ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss, averages
from .batch import GroupBatch, PreferenceBatch
from .moments import check_momentum, first_moments, moved_moments, standardized
from .registry import register_loss


@register_loss("alpha_dpo")
@dataclass(frozen=True)
class AlphaDPOLoss(Loss):
    """
    SimPO whose margin grows with how much further than usual the policy's gap is above the reference's.

    Args:
        alpha (`float`, *optional*, defaults to `0.2`):
            Nats per token of margin for each standard deviation, at least 0. At 0 the loss is SimPO.
        gamma_beta_ratio (`float`, *optional*, defaults to `0.6`):
            Margin of a usual pair, at least 0, in nats per token: SimPO's gamma over beta.
        momentum (`float`, *optional*, defaults to `0.9`):
            Share of the old value in the running mean and standard deviation, in `[0, 1)`.
    """

    paper: ClassVar[str] = "2410.10148"
    title: ClassVar[str] = "AlphaDPO: Adaptive Reward Margin for Direct Preference Optimization"
    citation: ClassVar[str] = """\
@article{wu2024alphadpo,
    title        = {{AlphaDPO: Adaptive Reward Margin for Direct Preference Optimization}},
    author       = {Junkang Wu and Xue Wang and Zhengyi Yang and Jiancan Wu and Jinyang Gao and Bolin Ding and Xiang Wang and Xiangnan He},
    year         = 2024,
    eprint       = {arXiv:2410.10148},
}"""

    alpha: float = 0.2
    gamma_beta_ratio: float = 0.6
    momentum: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha_dpo: `alpha={self.alpha}` must be at least 0 (0 is SimPO).")
        if self.gamma_beta_ratio < 0:
            raise ValueError(f"alpha_dpo: `gamma_beta_ratio={self.gamma_beta_ratio}` must be at least 0.")
        check_momentum("alpha_dpo", self.momentum)

    def init_state(self) -> dict[str, torch.Tensor]:
        return first_moments()

    def update(
        self,
        state: Mapping[str, torch.Tensor],
        batch: PreferenceBatch | GroupBatch,
        reduce: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda sums: sums,
    ) -> dict[str, torch.Tensor]:
        return moved_moments(state, _gap(batch, "logratios"), batch, self.momentum, reduce)

    def margin(self, batch: PreferenceBatch) -> torch.Tensor:
        """What each pair's gap is to exceed, shape `(B,)`, nats per token, without gradient."""
        state = batch.state or self.init_state()
        return self.gamma_beta_ratio + self.alpha * standardized(_gap(batch, "logratios"), state)

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        gap = _gap(batch)
        return -F.logsigmoid(batch.beta * (gap - self.margin(batch).to(gap.dtype)))

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        state = batch.state or self.init_state()
        return {
            "margin/mean": self.margin(batch).mean(),
            "gap/running_mean": state["mean"],
            "gap/running_std": state["std"],
        }


def _gap(batch: PreferenceBatch, of: str = "logps") -> torch.Tensor:
    """Chosen less rejected average, shape `(B,)`, nats per token."""
    chosen, rejected = averages(batch, of)
    return chosen - rejected
