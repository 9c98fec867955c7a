"""
Direct multi-turn preference optimisation (DMPO), Shi et al., https://huggingface.co/papers/2406.14868.

    L = -log sigmoid(beta * (c'_w - c'_l)),      c' = sum over turns t of phi(t, T) * (log-ratio of turn t)
    phi(t, T) = gamma^t * (1 - gamma^(T - t)) / (1 - gamma^T),      (T - t) / T at gamma = 1

The log-ratio of a turn (nats) is summed over its tokens. Turns are those of the assistant, numbered from 0; T is their number,
which each of the two completions has for itself. Tokens of users, systems and tools are not scored. phi is 1 for the first
turn and falls from turn to turn, so with one turn on both sides the loss is DPO.
Formula and default: the authors' code, the variant that weights turns (one that weights tokens stands beside it).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss
from .batch import PreferenceBatch, TokenBatch
from .registry import register_loss


@register_loss("dmpo")
@dataclass(frozen=True)
class DMPOLoss(Loss):
    """
    DPO in which later turns of the assistant count less.

    Args:
        gamma (`float`, *optional*, defaults to `0.7`):
            Discount of each turn, in (0, 1]. At 1 the weights fall in equal steps.
    """

    paper: ClassVar[str] = "2406.14868"
    title: ClassVar[str] = "Direct Multi-Turn Preference Optimization for Language Agents"
    citation: ClassVar[str] = """\
@inproceedings{shi2024direct,
    title        = {{Direct Multi-Turn Preference Optimization for Language Agents}},
    author       = {Wentao Shi and Mengqi Yuan and Junkang Wu and Qifan Wang and Fuli Feng},
    year         = 2024,
    booktitle    = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
}"""
    reads: ClassVar[frozenset[str]] = frozenset({"ref_logps", "token_logps"})
    one_turn: ClassVar[str] = "Every completion has one assistant turn: `dmpo` is then DPO (`sigmoid`)."

    gamma: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise ValueError(f"dmpo: `gamma={self.gamma}` must lie in (0, 1] (at 1 the weights fall in equal steps).")

    def weights(self, turns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """phi of each token's turn, shape `(B, T)`; `turns` are integers of that shape, -1 where nothing is scored."""
        t = turns.clamp(min=0).to(dtype)
        count = counted(turns).clamp(min=1).unsqueeze(1).to(dtype)
        log = math.log(self.gamma)
        if log == 0:
            return (count - t) / count
        # 1 - gamma^n is -expm1(n log gamma), which keeps its digits where gamma is near 1
        return torch.exp(t * log) * torch.expm1((count - t) * log) / torch.expm1(count * log)

    def _sums(self, batch: PreferenceBatch) -> list[torch.Tensor]:
        """Weighted log-ratios of the chosen and of the rejected completion, shape `(B,)` each, nats."""
        tokens = tokens_of(batch)
        sides = (
            (tokens.chosen_logps, tokens.ref_chosen_logps, tokens.chosen_turns),
            (tokens.rejected_logps, tokens.ref_rejected_logps, tokens.rejected_turns),
        )
        sums = []
        for logps, ref_logps, turns in sides:
            # No narrower than float32: gamma near 1, and many turns, need its digits
            phi = self.weights(turns, torch.promote_types(logps.dtype, torch.float32))
            sums.append(((phi * logps).sum(dim=1) - (phi * ref_logps).sum(dim=1)).to(logps.dtype))
        return sums

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected = self._sums(batch)
        return -F.logsigmoid(batch.beta * (chosen - rejected))

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        tokens = tokens_of(batch)
        counts = {"turns/chosen": counted(tokens.chosen_turns), "turns/rejected": counted(tokens.rejected_turns)}
        there = (counts["turns/chosen"] > 0) & (counts["turns/rejected"] > 0)
        return {name: count.float().masked_fill(~there, torch.nan) for name, count in counts.items()}


def counted(turns: torch.Tensor) -> torch.Tensor:
    """Number of turns of each row, shape `(B,)`; 0 where nothing is scored."""
    return turns.amax(dim=1) + 1


def tokens_of(batch: PreferenceBatch) -> TokenBatch:
    """The completions token by token, under policy and reference; a `ValueError` where the batch lacks one of them."""
    if batch.tokens is None:
        raise ValueError(
            "dmpo reads log-probabilities of tokens: give the `PreferenceBatch` a `TokenBatch` in `tokens`. The trainers do."
        )
    if batch.tokens.ref_chosen_logps is None or batch.tokens.ref_rejected_logps is None:
        raise ValueError(
            "dmpo reads the reference: give the `TokenBatch` `ref_chosen_logps` and `ref_rejected_logps`. A loss whose `reads` does "
            'not hold "ref_logps" is given none.'
        )
    return batch.tokens
