"""Sampling from the geometric mixture of two models."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor

from .prefill import last_logits, positions, prefill


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
        copies (`int`, *optional*, defaults to `1`):
            The rows are prompts that stand so many times in a row: each runs through the reference once, but for its last token.
    """

    def __init__(self, reference: Callable, attention_mask: torch.Tensor, coefficient: torch.Tensor, copies: int = 1):
        self.reference, self.mask, self.coefficient, self.copies = reference, attention_mask, coefficient, copies
        self.cache: DynamicCache | None = None
        self.seen = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self._begin(input_ids)
        new, self.seen = input_ids[:, self.seen :], input_ids.size(1)
        self.mask = nn.functional.pad(self.mask, (0, input_ids.size(1) - self.mask.size(1)), value=1)
        logits = self.reference(
            input_ids=new,
            attention_mask=self.mask,
            position_ids=positions(self.mask)[:, -new.size(1) :],
            past_key_values=self.cache,
            use_cache=True,
            **last_logits(self.reference),
        ).logits[:, -1]
        policy, reference = scores.float().log_softmax(-1), logits.float().log_softmax(-1)
        return (1 - self.coefficient) * policy + self.coefficient * reference

    def keep_rows(self, stay: torch.Tensor) -> None:
        """
        Go on with some of the rows alone.

        Args:
            stay (`torch.Tensor` of shape `(M,)`):
                Numbers of the rows, among those that there are.
        """
        self.mask, self.coefficient = self.mask[stay], self.coefficient[stay]
        self.cache.batch_select_indices(stay)

    def _begin(self, input_ids: torch.Tensor) -> None:
        if self.copies == 1:
            self.cache = DynamicCache(config=self.reference.config.get_text_config())
            return
        self.cache = prefill(self.reference, input_ids[:: self.copies], self.mask[:: self.copies], self.copies)
        self.seen = input_ids.size(1) - 1
