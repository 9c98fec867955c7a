"""
DPO with a dynamic beta (beta-DPO), Wu et al., https://huggingface.co/papers/2407.08639.

    v_i    = exp(-((delta_i - mean) / std)^2 / 2)
    kept   = int(B (1 - rho)) of the B pairs, at least one, drawn without replacement with chances v
    beta_b = beta * (1 + a * (mean of delta over the kept pairs - mean))
    L      = -log sigmoid(beta_b * delta_i) * B / (number kept)  for a kept pair i,  0  for another

delta is in nats, without beta. mean and std are running values of the batch's mean and standard deviation over all processes:
they begin at 0, have no bias correction, and take the micro-batch in before it is used. So in the first micro-batches beta_b is
further from beta than later, and chances are sharp. No gradient flows through beta_b, the statistics or the choice of pairs.

beta_b is at least 0.001, or beta itself where that is smaller. Where std is 0 (equal deltas, or never two pairs in a micro-batch)
all chances are equal. The draw needs no generator: it follows from the number of micro-batches so far, which is part of the
state, so it is the same on every device, goes on exactly in a resumed run, and neither changes nor is changed by other random
numbers. Each process draws from its own pairs, and its beta_b is that of its own kept pairs; the positions in the batch have the
same noise on all of them. (The authors gather the pairs of all processes first.)

Author code (`trainers.py`): chances, count, beta_b and its floor, momentum. `a` 0.6 and `rho` 0.2: its README. The guard for a
standard deviation of 0 and "at least one" are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss
from .batch import GroupBatch, PreferenceBatch, widened
from .moments import check_momentum, first_moments, moved_moments, standardized
from .registry import register_loss


FLOOR = 1e-3


@register_loss("beta_dpo")
@dataclass(frozen=True)
class BetaDPOLoss(Loss):
    """
    DPO whose beta follows the micro-batch's log-ratio gaps, on the pairs whose gaps are usual.

    Args:
        a (`float`, *optional*, defaults to `0.6`):
            How much beta changes with each nat by which the kept pairs' mean delta is above its running mean, at least 0,
            per nat. At 0 beta stays.
        rho (`float`, *optional*, defaults to `0.2`):
            Share of the pairs of a micro-batch that are filtered out, in `[0, 1)`. At 0 none is.
        momentum (`float`, *optional*, defaults to `0.9`):
            Share of the old value in the running mean and standard deviation, in `[0, 1)`.
    """

    paper: ClassVar[str] = "2407.08639"
    title: ClassVar[str] = "$\\beta$-DPO: Direct Preference Optimization with Dynamic $\\beta$"
    citation: ClassVar[str] = """\
@inproceedings{wu2024betadpo,
    title        = {{$\\beta$-DPO: Direct Preference Optimization with Dynamic $\\beta$}},
    author       = {Junkang Wu and Yuexiang Xie and Zhengyi Yang and Jiancan Wu and Jinyang Gao and Bolin Ding and Xiang Wang and Xiangnan He},
    booktitle    = {Advances in Neural Information Processing Systems},
    year         = 2024,
    eprint       = {arXiv:2407.08639},
}"""

    a: float = 0.6
    rho: float = 0.2
    momentum: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if self.a < 0:
            raise ValueError(f"beta_dpo: `a={self.a}` must be at least 0 (0 keeps beta as it is).")
        if not 0 <= self.rho < 1:
            raise ValueError(f"beta_dpo: `rho={self.rho}` must lie in [0, 1): it is the share of pairs filtered out.")
        check_momentum("beta_dpo", self.momentum)

    def init_state(self) -> dict[str, torch.Tensor]:
        return {**first_moments(), "batches": torch.zeros((), dtype=torch.long)}

    def update(
        self,
        state: Mapping[str, torch.Tensor],
        batch: PreferenceBatch | GroupBatch,
        reduce: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda sums: sums,
    ) -> dict[str, torch.Tensor]:
        moved = moved_moments(state, batch.delta, batch, self.momentum, reduce)
        return {**moved, "batches": state["batches"] + 1}

    def _adapted(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Which pairs are kept, shape `(B,)`, and the beta of the batch, shape `()`, in float32 or wider."""
        state = batch.state or self.init_state()
        delta = widened(batch.delta.detach())
        # Rounded first: 20 * (1 - 0.9) is a little less than 2
        count = max(1, int(round(len(delta) * (1 - self.rho), 9)))
        # Those with the largest log-chance plus Gumbel noise: a draw without replacement, whose chances cannot underflow
        noise = -(-_uniform(state["batches"].to(delta.device), len(delta)).log()).log()
        chosen = (noise - standardized(delta, state) ** 2 / 2).topk(count).indices
        kept = torch.zeros_like(delta, dtype=torch.bool).scatter(0, chosen, True)
        gap = torch.where(kept, delta, 0).sum() / count - state["mean"].to(delta)
        return kept, (batch.beta * (1 + self.a * gap)).clamp(min=min(FLOOR, batch.beta))

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        kept, beta = self._adapted(batch)
        dtype = batch.delta.dtype
        values = -F.logsigmoid(beta.to(dtype) * batch.delta)
        return torch.where(kept, values * (len(kept) / kept.sum()).to(dtype), 0)

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        kept, beta = self._adapted(batch)
        state = batch.state or self.init_state()
        return {
            "beta/adapted": beta,
            "kept/share": kept.float().mean(),
            "delta/running_mean": state["mean"],
            "delta/running_std": state["std"],
        }


def _uniform(seed: torch.Tensor, count: int) -> torch.Tensor:
    """
    `count` numbers in (0, 1), float32, that follow from the whole number `seed` alone, on any device.

    A hash of seed and position to 32 bits (Wellons' `lowbias32`), of which 23 are used, so that none rounds to 0 or 1. A
    generator would have to be seeded with a number that the host knows, for which it would wait for the device.
    """
    bits = 0xFFFFFFFF
    index = torch.arange(1, count + 1, device=seed.device)

    def mixed(value: torch.Tensor) -> torch.Tensor:
        value = ((value ^ (value >> 16)) * 0x7FEB352D) & bits
        value = ((value ^ (value >> 15)) * 0x846CA68B) & bits
        return value ^ (value >> 16)

    return ((mixed((mixed(seed + 1) + index) & bits) >> 9).float() + 0.5) / 2**23
