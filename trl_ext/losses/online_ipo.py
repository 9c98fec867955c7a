"""
Online IPO, Calandriello et al., https://huggingface.co/papers/2403.08635.

    L = (delta - (P - 1/2) / tau)^2,      tau = beta

delta is the difference of the log-ratios summed over tokens, in nats, and P the probability that the first of the two
completions, sampled from the policy, is preferred. With a hard label (P = 1) the target is 1 / (2 tau): TRL's online
`ipo`. TRL's offline `ipo` divides log-ratios by lengths; this one does not. The formula is from code of a third party.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, refuse_values
from .batch import PreferenceBatch


@dataclass(frozen=True)
class OnlineIPOLoss(Loss):
    """Squared distance of `delta` to the probability of the preference minus 1/2, in units of `beta`."""

    paper: ClassVar[str] = "2403.08635"
    title: ClassVar[str] = "Human Alignment of Large Language Models through Online Preference Optimisation"
    optional_columns: ClassVar[tuple[str, ...]] = ("preference_prob",)

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        if "preference_prob" not in batch.columns:
            return (batch.delta - 1 / (2 * batch.beta)) ** 2
        probability = batch.column("preference_prob")
        refuse_values(~((probability >= 0) & (probability <= 1)), "ipo: `preference_prob` must lie in [0, 1].")
        target = (probability.detach() - 0.5) / batch.beta
        return (batch.delta - target.to(batch.delta.dtype)) ** 2

    @property
    def divides_by_beta(self) -> bool:
        return True
