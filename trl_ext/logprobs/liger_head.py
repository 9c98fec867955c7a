"""The head through Liger's Triton cross-entropy: one kernel a tile from logits to loss and, in place, their gradient."""

import inspect

import torch

from . import torch_head


# Arguments of Liger's function by name
OPTIONS = (
    "bias",
    "softcap",
    "reduction",
    "chunk_mem_const",
    "return_token_accuracy",
    "token_grad_output",
    "compute_gradients",
    "weight_requires_grad",
    "accum_dtype",
)


def can(transform) -> bool:
    """Liger's kernel has no temperature outside a soft cap."""
    return transform.softcap is None or transform.temperature == 1.0


def can_keep(transform) -> bool:
    return False  # the kernel overwrites the logits with a gradient that lacks the upstream factor


def bytes_per_logit(dtype: torch.dtype) -> int:
    return dtype.itemsize


def forward(hidden, weight, bias, targets, transform, statistics, rows, gradient_rows=None, keep=False):
    """As [`torch_head.forward`]; what the kernel does not know (entropy) takes another pass over tiles."""
    scaled, scaled_bias, softcap = _scaled(hidden, bias, transform)
    loss, _, accuracy, _, grad_hidden, _, _ = _liger(
        scaled,
        weight,
        targets,
        scaled_bias,
        softcap,
        rows,
        return_token_accuracy="is_top1" in statistics,
        compute_gradients=gradient_rows is not None,
    )
    if gradient_rows is not None:
        torch.mul(grad_hidden, -transform.factor, out=gradient_rows)
    log_probs = loss.neg_()
    entropy = log_sum_sq = mean_logits = None
    if "mean_logits" in statistics and softcap is None:
        mean_bias = 0.0 if bias is None else bias.mean(dtype=torch.float32)
        mean_logits = (hidden.float() @ weight.mean(dim=0, dtype=torch.float32) + mean_bias) * transform.factor
    passed_over = {"entropy", "log_sum_sq_probs"} & set(statistics)
    if "mean_logits" in statistics and mean_logits is None:
        passed_over.add("mean_logits")
    if passed_over:
        tile = max(1, rows * bytes_per_logit(hidden.dtype) // torch_head.bytes_per_logit(hidden.dtype))
        (_, entropy, log_sum_sq, capped_mean, _), _ = torch_head.forward(
            hidden, weight, bias, targets, transform, tuple(passed_over), tile
        )
        mean_logits = capped_mean if mean_logits is None else mean_logits
    is_top1 = accuracy.bool() if accuracy is not None else None
    return (log_probs, entropy, log_sum_sq, mean_logits, is_top1), log_probs


def backward(upstream, hidden, weight, bias, targets, saved, transform, rows, needs):
    """As [`torch_head.backward`]: Liger computes the logits again and takes the upstream gradient of each token in."""
    scaled, scaled_bias, softcap = _scaled(hidden, bias, transform)
    *_, grad_hidden, grad_weight, grad_bias = _liger(
        scaled,
        weight,
        targets,
        scaled_bias,
        softcap,
        rows,
        token_grad_output=-upstream,
        compute_gradients=True,
        weight_requires_grad=needs[1],
        accum_dtype=torch.float32,
    )
    if transform.factor != 1.0:
        grad_hidden.mul_(transform.factor)
        grad_bias = None if grad_bias is None else grad_bias * transform.factor
    return grad_hidden if needs[0] else None, grad_weight, grad_bias if needs[2] else None


def _scaled(hidden, bias, transform):
    """Liger knows no scale: it goes into the hidden states and the bias."""
    if transform.factor == 1.0:
        return hidden, bias, transform.softcap
    return hidden * transform.factor, None if bias is None else bias * transform.factor, transform.softcap


def missing_options() -> list[str]:
    """What this file asks of Liger's function and the installed one does not take."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    return [name for name in OPTIONS if name not in inspect.signature(fused_linear_cross_entropy_forward).parameters]


def _liger(hidden, weight, targets, bias, softcap, rows, **options):
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    options = {"compute_gradients": False, "weight_requires_grad": False, **options}
    return fused_linear_cross_entropy_forward(
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=softcap,
        reduction="none",
        chunk_mem_const=chunk_multiplier(rows, hidden.shape, weight.shape[0]),
        **options,
    )


def chunk_multiplier(rows: int, shape: tuple[int, int], vocabulary: int) -> int:
    """
    Liger's `chunk_mem_const` for tiles of at most `rows` tokens.

    Liger takes `next_power_of_2(ceil(tokens / ceil(V / (C H))))` tokens per tile, `C` being this number; it is at least 1,
    so a tile is never smaller than the hidden states themselves.
    """
    tokens, width = shape
    if rows >= tokens:
        return max(1, -(-vocabulary // width))  # one tile
    tile = 1 << (rows.bit_length() - 1)  # the power of 2 at or below
    tiles = -(-tokens // tile)
    # The largest C with ceil(V / (C H)) >= tiles
    return max(1, -(-vocabulary // ((tiles - 1) * width)) - 1)
