"""
A number for each token from the logits of several models, tile by tile, where the head computes log-probabilities else.

[`Head`] runs the tiles and the products of the backward; this file is what fills a tile, in place of `torch_head.py` or
`liger_head.py`. Like a log-probability, a token's number depends on that token's hidden state alone, so everything that the head
does to keep few logits in memory holds here too.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from .head import Head, Transform, compute_dtype
from .products import statistics_dtype
from .torch_head import logits_tile


# Tiles in memory at once, measured: the logits of three models, their distributions, what autograd keeps of a function of them
TILES = 10


@dataclass(frozen=True)
class Projection:
    """
    What a model would make its logits from.

    Attributes:
        hidden (`torch.Tensor` of shape `(M, H)`):
            Hidden states of `M` tokens.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of its head, in the dtype of the hidden states.
        bias (`torch.Tensor` of shape `(V,)` or `None`):
            Bias of its head.
        transform ([`Transform`]):
            What it does to its logits.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: Transform

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of some of the tokens, shape `(n, V)`, in float32 or wider."""
        hidden = self.hidden[tokens].to(self.weight.device)
        tile = hidden.new_empty(len(tokens), len(self.weight), dtype=statistics_dtype(hidden.dtype))
        logits_tile(tile, hidden, self.weight, self.bias, self.transform, slope=False)
        return tile


@dataclass(frozen=True)
class Divergence:
    """
    A function of the logits of one model that has a gradient, and of others that have none.

    Attributes:
        function (`Callable`):
            From logits `(n, V)` of each model, the one with a gradient first, to `(n,)`; each row by itself.
        others (`tuple[Projection, ...]`):
            The models without a gradient, all with the same `M` tokens.
        numbers (`torch.Tensor` of shape `(N,)`):
            Which of their tokens each of the first model's is, -1 for one that has no number.
    """

    function: Callable[..., torch.Tensor]
    others: tuple[Projection, ...]
    numbers: torch.Tensor

    def __call__(
        self,
        head: Head,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transform: Transform,
        gather: Callable[..., AbstractContextManager],
    ) -> torch.Tensor:
        """The function of each of `N` tokens, 0 for one that has no number; arguments as those of [`Head`]."""
        numbers = self.numbers.to(hidden.device)
        kept = numbers >= 0
        values = head.through(self, hidden[kept], weight, bias, numbers[kept], transform, gather=gather).log_probs
        return values.new_zeros(len(hidden)).masked_scatter(kept, values)

    # What [`Head`] asks of what fills its tiles

    def tile_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return statistics_dtype(dtype)

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        return TILES * statistics_dtype(dtype).itemsize

    def forward_tile(self, tile, hidden, weight, bias, targets, transform, outputs, gradient: bool) -> None:
        """As [`torch_head.forward_tile`]: `outputs.log_probs` are the numbers, and `targets` which token of the others each is."""
        outputs.log_probs.copy_(self._fill(tile, hidden, weight, bias, targets, transform, gradient))

    def gradient_tile(self, tile, hidden, weight, bias, targets, transform, log_probs) -> None:
        """As [`torch_head.gradient_tile`]."""
        self._fill(tile, hidden, weight, bias, targets, transform, gradient=True)

    def _fill(self, tile, hidden, weight, bias, tokens, transform, gradient: bool) -> torch.Tensor:
        """The numbers of a tile, which then, where `gradient` is set, holds minus their derivative by what the soft cap takes."""
        slope = logits_tile(tile, hidden, weight, bias, transform, slope=gradient)
        others = [other.logits(tokens).to(tile.device) for other in self.others]
        logits = tile.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            values = self.function(logits, *others)
        if gradient:
            (derivative,) = torch.autograd.grad(values, logits, torch.ones_like(values))
            torch.neg(derivative, out=tile)
            if slope is not None:
                tile.mul_(slope)
        return values.detach()


def projection(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transform: Transform, copied: bool
) -> Projection:
    """
    What a head is given in a forward without gradients, kept for later.

    Args:
        hidden (`torch.Tensor` of shape `(M, H)`):
            Hidden states.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the head.
        bias (`torch.Tensor` of shape `(V,)` or `None`):
            Bias of the head.
        transform ([`Transform`]):
            What the model does to its logits.
        copied (`bool`):
            Whether to copy the head: one that is sharded is whole in its model's forward alone.
    """
    dtype = compute_dtype(hidden)
    head = [each if each is None else each.detach().to(dtype, copy=copied) for each in (weight, bias)]
    return Projection(hidden.detach().to(dtype), *head, transform)
