"""
Aligned supervised fine-tuning (ASFT), Wang et al., https://huggingface.co/papers/2409.10571. Not Anchored SFT, another method
of the same abbreviation.

    L = -avg_w + weight * (-log sigmoid(odds_w) - log sigmoid(-odds_l)),   odds = avg - log(1 - e^avg)
      = -(1 + weight) * avg_w - weight * log(1 - e^avg_l)

avg is a completion's log-probability per token under the policy, in nats (lengths are clamped to 1), so e^avg is the geometric mean
of its tokens' probabilities and odds are log-odds. The likelihood of the chosen completion rises and that of the rejected
one falls, each by itself, not their difference. The two lines are equal, for sigmoid(odds) = e^avg; the second is computed, in
which 1 - e^avg_l is at least 1e-7. There is no reference model, and `beta` is not read. How sure this is: `evidence` below.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, averages
from .batch import PreferenceBatch
from .bias_variance import present
from .registry import register_loss


# Where e^avg is 1 - 1e-7
LARGEST_AVERAGE = math.log1p(-1e-7)


def log_complement(average: torch.Tensor) -> torch.Tensor:
    """`log(1 - e^average)`, at least `log(1e-7)`; of an average near 0 to the last digit."""
    return torch.log(-torch.expm1(average.clamp(max=LARGEST_AVERAGE)))


@register_loss("asft", aliases=["aligned_sft"])
@dataclass(frozen=True)
class ASFTLoss(Loss):
    """
    Negative log-likelihood of the chosen completion, and absolute log-odds of both.

    Args:
        weight (`float`, *optional*, defaults to `0.1`):
            Factor of the terms in the odds, at least 0. At 0 the loss is the negative log-likelihood per token of the chosen
            completion.
    """

    paper: ClassVar[str] = "2409.10571"
    title: ClassVar[str] = "ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood"
    citation: ClassVar[str] = """\
@article{wang2024asft,
    title        = {{ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood}},
    author       = {Ruoyu Wang and Jiachen Sun and Shaowei Hua and Quan Fang},
    year         = 2024,
    eprint       = {arXiv:2409.10571},
}"""
    evidence: ClassVar[str] = (
        "The formula and `weight` of 0.1 are from code of a third party, which takes log-probabilities as sums unless it is told to "
        "average; that averages over tokens are meant, as here, is ours."
    )
    reads: ClassVar[frozenset[str]] = frozenset()

    weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.weight < 0:
            raise ValueError(f"asft: `weight={self.weight}` must be at least 0 (0 is plain SFT).")

    @property
    def reads_beta(self) -> bool:
        return False

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected = averages(batch)
        return -(1 + self.weight) * chosen - self.weight * log_complement(rejected)

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        chosen, rejected = (average.detach() for average in averages(batch))
        values = {
            "nll/mean": -chosen,
            "log_odds/chosen": chosen - log_complement(chosen),
            "log_odds/rejected": rejected - log_complement(rejected),
        }
        return {name: value.masked_fill(~present(batch), torch.nan) for name, value in values.items()}
