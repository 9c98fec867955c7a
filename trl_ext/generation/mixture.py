"""Sampling from the geometric mixture of two models."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor

from .prefill import positions


class GeometricMixture(LogitsProcessor):
    """
    Makes the model that is sampled from the mixture `pi^(1 - c) ref^c`, renormalised at each token.

    The normaliser of whole completions is thereby approximated token by token, as IPO-MD and Nash-MD do in practice.

    Args:
        reference (`Callable`):
            The reference model. Keeps a cache of its own, so each token runs through it once.
        attention_mask (`torch.Tensor` of shape `(N, P)`):
            Of the prompts, padded on the left.
        coefficient (`torch.Tensor` of shape `(N, 1)`):
            Weight `c` of the reference for each row.
    """

    def __init__(self, reference: Callable, attention_mask: torch.Tensor, coefficient: torch.Tensor):
        self.reference, self.mask, self.coefficient = reference, attention_mask, coefficient
        self.cache, self.seen = DynamicCache(config=reference.config.get_text_config()), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self.seen :]
        self.mask = nn.functional.pad(self.mask, (0, input_ids.size(1) - self.mask.size(1)), value=1)
        self.seen = input_ids.size(1)
        logits = self.reference(
            input_ids=new,
            attention_mask=self.mask,
            position_ids=positions(self.mask)[:, -new.size(1) :],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        policy, reference = scores.float().log_softmax(-1), logits.float().log_softmax(-1)
        return (1 - self.coefficient) * policy + self.coefficient * reference
