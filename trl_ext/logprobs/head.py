"""
Log-probabilities of target tokens from hidden states, without the logits of all of them at once.

The projection through `lm_head` runs on tiles of tokens sized to a memory budget. What is kept for the backward depends
on what needs a gradient, so that as few matrix products run as the case allows:

| what needs a gradient | forward | backward | products |
| --- | --- | --- | --- |
| nothing (reference, evaluation) | logits | - | 1 |
| hidden states (LoRA, a frozen head) | logits, one gradient row per token | rows times the upstream gradient | 2 |
| head too, all logits fit three tiles | logits, probabilities kept | two products | 3 |
| head too | logits | logits again, two products | 4 |

The second line is exact for every loss: `d log p_t / d h_t` depends on token `t` alone, so its row can be formed before
the upstream gradient is known.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import liger_head, torch_head


BACKENDS = {"torch": torch_head, "liger": liger_head}

# MiB for a tile of logits. On a CPU a tile that stays near the cache is the fastest; on a GPU this is what TRL's head
# allots too (4096 x 32768 in bfloat16), and 880 rows of a vocabulary of 152k.
DEFAULT_MEMORY_MB = {"cpu": 32, "default": 256}

# A head that is trained runs three products instead of four if all probabilities are kept: worth this many tiles' memory
KEEP_TILES = 3

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TokenLogProbs(NamedTuple):
    """
    What the head says of each of `N` tokens; a field that was not asked for is `None`. Only `log_probs` has a gradient.

    Attributes:
        log_probs (`torch.Tensor` of shape `(N,)`):
            Log-probability of the target, in nats; float32, or float64 for float64 input.
        entropy (`torch.Tensor` of shape `(N,)`, *optional*):
            Entropy of the distribution, in nats.
        log_sum_sq_probs (`torch.Tensor` of shape `(N,)`, *optional*):
            `log(sum_v p_v^2)`.
        mean_logits (`torch.Tensor` of shape `(N,)`, *optional*):
            Mean of the logits over the vocabulary.
        is_top1 (`torch.Tensor` of shape `(N,)`, *optional*):
            Whether the target is the most likely token.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


@dataclass(frozen=True)
class Transform:
    """What a model does to its logits `z = h W^T + b`: `softcap * tanh(z * scale / softcap) / temperature`."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """The linear part of the derivative."""
        return self.scale / self.temperature


@dataclass(frozen=True)
class Head:
    """
    Computes token log-probabilities.

    Args:
        backend (`str`, *optional*, defaults to `"torch"`):
            `"torch"`, or `"liger"` for Liger's Triton cross-entropy.
        memory_mb (`float`, *optional*):
            MiB for one tile of logits. Defaults to 256 on accelerators and 32 on a CPU. Where the head is trained and all
            logits fit in three tiles, they are kept and not computed twice.
    """

    backend: str = "torch"
    memory_mb: float | None = None

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: Transform = Transform(),
        statistics: tuple[str, ...] = (),
        gather: Callable[..., AbstractContextManager] = lambda *parameters: nullcontext(),
    ) -> TokenLogProbs:
        """
        Args:
            hidden (`torch.Tensor` of shape `(N, H)`):
                Hidden states, one per scored token.
            weight (`torch.Tensor` of shape `(V, H)`):
                Weight of the head.
            bias (`torch.Tensor` of shape `(V,)` or `None`):
                Bias of the head.
            targets (`torch.Tensor` of shape `(N,)`):
                Token ids.
            transform ([`Transform`], *optional*):
                Scale, soft cap and temperature of the logits.
            statistics (`tuple[str, ...]`, *optional*):
                Which of the other fields of [`TokenLogProbs`] to compute.
            gather (`Callable`, *optional*):
                Context manager that makes sharded parameters whole, entered again in the backward.
        """
        module = BACKENDS[self.backend]
        if not module.can(transform) or not hidden.shape[0]:
            module = torch_head
        dtype = compute_dtype(hidden)
        rows = self.tile_rows(hidden, weight.shape[0], module.bytes_per_logit(dtype))
        arguments = (targets, transform, statistics, module, rows, dtype, gather)
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
        ):
            return TokenLogProbs(*_TokenLogProbs.apply(hidden, weight, bias, *arguments))
        outputs, _ = module.forward(
            hidden.to(dtype), weight.to(dtype), cast(bias, dtype), targets, transform, statistics, rows
        )
        return TokenLogProbs(*outputs)

    def tile_rows(self, hidden: torch.Tensor, vocabulary: int, bytes_per_logit: int) -> int:
        """Tokens per tile, at least 1."""
        budget = self.memory_mb or DEFAULT_MEMORY_MB.get(hidden.device.type, DEFAULT_MEMORY_MB["default"])
        rows = int(budget * 2**20 / (vocabulary * bytes_per_logit))
        return max(1, min(rows, hidden.shape[0]))


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What the products run in: the dtype of autocast, if it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, statistics, module, rows, dtype, gather):
        ctx.set_materialize_grads(False)
        ctx.gradient_rows = not any(ctx.needs_input_grad[1:3])
        keep = not ctx.gradient_rows and hidden.shape[0] <= KEEP_TILES * rows and module.can_keep(transform)
        if keep:
            rows = max(hidden.shape[0], 1)
        # In the forward and not in the backward: the rows need no upstream gradient
        gradient_rows = None
        if ctx.gradient_rows:
            gradient_rows = torch.empty(hidden.shape, device=hidden.device, dtype=torch_head.statistics_dtype(dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            outputs, saved = module.forward(
                hidden.to(dtype),
                weight.to(dtype),
                cast(bias, dtype),
                targets,
                transform,
                statistics,
                rows,
                gradient_rows=gradient_rows,
                keep=keep,
            )
        if ctx.gradient_rows:
            ctx.save_for_backward(gradient_rows)
            ctx.dtype = hidden.dtype
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, saved)
            ctx.module, ctx.transform, ctx.rows, ctx.dtype, ctx.gather = module, transform, rows, dtype, gather
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        rest = (None,) * 7
        if upstream is None:
            return (None, None, None, *rest)
        if ctx.gradient_rows:
            (gradient_rows,) = ctx.saved_tensors
            return ((gradient_rows * upstream.unsqueeze(1)).to(ctx.dtype), None, None, *rest)
        hidden, weight, bias, targets, saved = ctx.saved_tensors
        parameters = [parameter for parameter in (weight, bias) if parameter is not None]
        with ctx.gather(*parameters), torch.autocast(hidden.device.type, enabled=False):
            gradients = ctx.module.backward(
                upstream,
                hidden.to(ctx.dtype),
                weight.to(ctx.dtype),
                cast(bias, ctx.dtype),
                targets,
                saved,
                ctx.transform,
                ctx.rows,
                ctx.needs_input_grad[:3],
            )
        gradients = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        return (*gradients, *rest)
