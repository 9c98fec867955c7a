"""
Log-probabilities of target tokens from hidden states, without the logits of all of them at once.

The projection through `lm_head` runs on tiles of tokens sized to the memory there is. A backend turns a tile into
log-probabilities and, in place, into their gradient `G`; what is kept of it for the backward depends on what needs a
gradient, so that as few matrix products run as the case allows:

| what needs a gradient | forward | backward | products |
| --- | --- | --- | --- |
| nothing (reference, evaluation) | logits | - | 1 |
| hidden states (LoRA, a frozen head) | logits, one row of `G W` per token | rows times the upstream gradient | 2 |
| head too, and memory for all tiles | logits, `G` kept | two products | 3 |
| head too | logits | logits again, two products | 4 |

Statistics take no further product. The second line is exact for every loss: `d log p_t / d h_t` depends on token `t`
alone, so its row can be formed before the upstream gradient is known. For the same reason `G` is never multiplied by the
upstream gradient `u`, which goes into the small tensors: `u (G W)` for the hidden states and `G^T (u h)` for the weight.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import liger_head, torch_head
from .memory import Plan, free_and_room, plan_for_budget, plan_for_memory
from .products import add_product, product, statistics_dtype


BACKENDS = {"torch": torch_head, "liger": liger_head}

# MiB for a tile of logits. On a CPU a tile that stays near the cache is the fastest. Other devices have this where they do
# not say how much of their memory is free.
DEFAULT_MEMORY_MB = {"cpu": 32, "default": 256}

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
            MiB for one tile of logits. Where the head is trained and all logits fit in three tiles, they are kept and not
            computed twice. Defaults to 32 on a CPU. A GPU is asked by default: a tile has up to 4096 tokens, and all tiles are
            kept, where that does not raise the peak of the run; 256 MiB and a quarter of the free memory bound a tile else.
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
        if not module.can(transform, compute_dtype(hidden)) or not hidden.shape[0]:
            module = torch_head
        return self.through(module, hidden, weight, bias, targets, transform, statistics, gather)

    def through(
        self,
        module: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: Transform,
        statistics: tuple[str, ...] = (),
        gather: Callable[..., AbstractContextManager] = lambda *parameters: nullcontext(),
    ) -> TokenLogProbs:
        """As a call, with tiles that `module` fills: a backend, or a [`~trl_ext.logprobs.divergence.Divergence`]."""
        dtype = compute_dtype(hidden)
        trained = torch.is_grad_enabled() and weight.requires_grad
        plan = self.plan(hidden, weight, module.bytes_per_logit(dtype), trained)
        arguments = (targets, transform, statistics, module, plan, dtype, gather)
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
        ):
            return TokenLogProbs(*_TokenLogProbs.apply(hidden, weight, bias, *arguments))
        outputs, _ = _forward(
            module, hidden.to(dtype), weight.to(dtype), cast(bias, dtype), targets, transform, statistics, plan.rows
        )
        return outputs

    def plan(self, hidden: torch.Tensor, weight: torch.Tensor, bytes_per_logit: int, trained: bool) -> Plan:
        """Tokens per tile, and whether a head that is trained keeps all tiles."""
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        memory = None if self.memory_mb else free_and_room(hidden.device)
        if memory is None:
            budget = self.memory_mb or DEFAULT_MEMORY_MB.get(hidden.device.type, DEFAULT_MEMORY_MB["default"])
            return plan_for_budget(budget, tokens, vocabulary, bytes_per_logit)
        free, room = memory
        # In the backward the gradients of the hidden states and of the weight stand beside the tile, in float32
        beside = 4 * (hidden.numel() + (weight.numel() if trained else 0))
        return plan_for_memory(free, room - beside, tokens, vocabulary, bytes_per_logit)


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What the products run in: the dtype of autocast, if it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _tiles(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _forward(
    module, hidden, weight, bias, targets, transform, statistics, rows, keep=False, gradient_rows=None
) -> tuple[TokenLogProbs, torch.Tensor | None]:
    """
    Values of all tokens, and where `keep` is set the `(N, V)` gradient that [`torch_head.forward_tile`] describes.
    `gradient_rows` `(N, H)` are filled with that gradient times the weight.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if keep and transform.softcap is None:  # the derivative of a soft cap may take a second tile
        rows = max(tokens, 1)
    wide = statistics_dtype(hidden.dtype)
    new = {"device": hidden.device, "dtype": wide}
    empty = {name: torch.empty(tokens, **new) for name in ("log_probs", *statistics) if name != "is_top1"}
    if "is_top1" in statistics:
        empty["is_top1"] = torch.empty(tokens, device=hidden.device, dtype=torch.bool)
    outputs = filled = TokenLogProbs(**empty)
    if outputs.mean_logits is not None and transform.softcap is None:
        # The mean of the logits is the logit of the mean row: no pass over the tile
        mean_row, mean_bias = weight.mean(dim=0, dtype=wide), 0.0 if bias is None else bias.mean(dtype=wide)
        filled = outputs._replace(mean_logits=None)
    buffer = hidden.new_empty(tokens if keep else min(rows, tokens), vocabulary, dtype=module.tile_dtype(hidden.dtype))
    for here in _tiles(tokens, rows):
        tile = buffer[here] if keep else buffer[: here.stop - here.start]
        inputs = (hidden[here], weight, bias, targets[here], transform)
        fields = TokenLogProbs(*(None if field is None else field[here] for field in filled))
        module.forward_tile(tile, *inputs, fields, gradient=keep or gradient_rows is not None)
        if filled is not outputs:
            outputs.mean_logits[here] = (hidden[here].to(wide) @ mean_row + mean_bias) * transform.factor
        if gradient_rows is not None:
            product(tile, weight, out=gradient_rows[here])
    return outputs, buffer if keep else None


def _backward(upstream, module, hidden, weight, bias, targets, log_probs, kept, transform, rows, needs, weight_dtype):
    """Gradients of hidden states, weight and bias, each `None` where `needs` is false."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    dtype, wide, tile_dtype = hidden.dtype, statistics_dtype(hidden.dtype), module.tile_dtype(hidden.dtype)
    if kept is not None:
        rows = max(tokens, 1)
    # One product sums inside in float32, so its result can be written as it is wanted
    direct = rows >= tokens and dtype == tile_dtype == weight_dtype != torch.float16
    new = torch.empty if tokens else torch.zeros
    grad_hidden = new(hidden.shape, device=hidden.device, dtype=wide) if needs[0] else None
    grad_weight = new(weight.shape, device=hidden.device, dtype=dtype if direct else wide) if needs[1] else None
    grad_bias = new(bias.shape, device=hidden.device, dtype=wide) if needs[2] else None
    factors = upstream.to(wide).unsqueeze(1) * -transform.factor
    shares, largest = factors, None
    if dtype == torch.float16:
        # Small factors times hidden states would underflow
        largest = factors.abs().amax().clamp_min(torch.finfo(wide).tiny) if tokens else factors.new_ones(())
        shares = factors / largest
    buffer = hidden.new_empty(min(rows, tokens), vocabulary, dtype=tile_dtype) if kept is None else kept
    for here in _tiles(tokens, rows):
        tile, first = buffer[: here.stop - here.start], here.start == 0
        if kept is None:
            module.gradient_tile(tile, hidden[here], weight, bias, targets[here], transform, log_probs[here])
        if needs[0]:
            product(tile, weight, out=grad_hidden[here])
        if needs[1]:
            add_product(grad_weight, tile, (hidden[here] * shares[here]).to(tile_dtype), dtype, first)
        if needs[2]:
            add_product(grad_bias.unsqueeze(1), tile, shares[here].to(tile_dtype), dtype, first)
    if needs[0]:
        grad_hidden.mul_(factors)
    if largest is not None:
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:
                gradient.mul_(largest)
    return grad_hidden, grad_weight, grad_bias


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, statistics, module, plan, dtype, gather):
        ctx.set_materialize_grads(False)
        ctx.gradient_rows = not any(ctx.needs_input_grad[1:3])
        # In the forward and not in the backward: the rows need no upstream gradient
        gradient_rows = None
        if ctx.gradient_rows:
            # Rounded to half precision they would bring the gradient further from float64 than TRL's
            gradient_rows = torch.empty(hidden.shape, device=hidden.device, dtype=statistics_dtype(dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            outputs, kept = _forward(
                module,
                hidden.to(dtype),
                weight.to(dtype),
                cast(bias, dtype),
                targets,
                transform,
                statistics,
                plan.rows,
                keep=plan.keep and not ctx.gradient_rows,
                gradient_rows=gradient_rows,
            )
        ctx.transform, ctx.dtype = transform, dtype
        if ctx.gradient_rows:
            ctx.save_for_backward(gradient_rows)
            ctx.dtype = hidden.dtype
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, outputs.log_probs, kept)
            ctx.module, ctx.rows, ctx.gather = module, plan.rows, gather
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        rest = (None,) * 7
        if upstream is None:
            return (None, None, None, *rest)
        if ctx.gradient_rows:
            (gradient_rows,) = ctx.saved_tensors
            factors = upstream.unsqueeze(1) * -ctx.transform.factor
            return ((gradient_rows * factors).to(ctx.dtype), None, None, *rest)
        hidden, weight, bias, targets, log_probs, kept = ctx.saved_tensors
        parameters = [parameter for parameter in (weight, bias) if parameter is not None]
        with ctx.gather(*parameters), torch.autocast(hidden.device.type, enabled=False):
            gradients = _backward(
                upstream,
                ctx.module,
                hidden.to(ctx.dtype),
                weight.to(ctx.dtype),
                cast(bias, ctx.dtype),
                targets,
                log_probs,
                kept,
                ctx.transform,
                ctx.rows,
                ctx.needs_input_grad[:3],
                weight.dtype,
            )
        gradients = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        return (*gradients, *rest)
