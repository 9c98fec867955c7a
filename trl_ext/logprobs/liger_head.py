"""The head through Liger's Triton cross-entropy: one kernel from a tile of logits to loss and, in place, its gradient."""

import inspect

import torch

from .products import project


# What the kernel is launched with besides tensors, their strides and what a tile decides
CONSTANTS = {
    "weight_ptr": None,
    "z_loss_ptr": None,
    "predicted_tokens_ptr": None,
    "predicted_tokens_stride": 0,
    "n_non_ignore": 1,
    "sum_non_ignore_weight": 1,
    "weight_sum": 1,
    "ignore_index": -100,  # is not among the targets
    "lse_square_scale": 0.0,
    "label_smoothing": 0.0,
    "reduction": "none",
    "RETURN_Z_LOSS": False,
    "RETURN_PREDICTED_TOKENS": False,
    "HAS_WEIGHT": False,
}
ARGUMENTS = (
    *CONSTANTS,
    "X_ptr",
    "X_stride",
    "Y_ptr",
    "Y_stride",
    "loss_ptr",
    "loss_stride",
    "token_accuracy_ptr",
    "token_accuracy_stride",
    "n_cols",
    "softcap",
    "RETURN_TOKEN_ACCURACY",
    "HAS_SOFTCAPPING",
    "HAS_GRADIENTS",
    "BLOCK_SIZE",
)


def can(transform, dtype: torch.dtype) -> bool:
    """Liger's kernel has no temperature outside a soft cap, and computes in float32."""
    return (transform.softcap is None or transform.temperature == 1.0) and dtype != torch.float64


def tile_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def bytes_per_logit(dtype: torch.dtype) -> int:
    return dtype.itemsize


def forward_tile(tile, hidden, weight, bias, targets, transform, outputs, gradient: bool) -> None:
    """As [`torch_head.forward_tile`]; what Liger's kernel does not know takes a pass over the tile and no further product."""
    project(tile, hidden, weight, bias, transform.factor)
    own = (outputs.entropy, outputs.log_sum_sq_probs, outputs.mean_logits)
    if any(output is not None for output in own):
        from .statistics_kernel import statistics

        for output, values in zip(own, statistics(tile, transform.softcap), strict=True):
            if output is not None:
                output.copy_(values)
    accuracy = None if outputs.is_top1 is None else torch.empty_like(outputs.log_probs)
    _cross_entropy(tile, targets, transform.softcap, outputs.log_probs, accuracy, gradient)
    outputs.log_probs.neg_()
    if accuracy is not None:
        outputs.is_top1.copy_(accuracy)


def gradient_tile(tile, hidden, weight, bias, targets, transform, log_probs) -> None:
    """As [`torch_head.gradient_tile`]."""
    project(tile, hidden, weight, bias, transform.factor)
    _cross_entropy(tile, targets, transform.softcap, torch.empty_like(log_probs), None, gradient=True)


def why_not() -> str | None:
    """What this file and the installed Liger's kernel do not have in common."""
    try:
        kernel, *_ = _liger()
    except ImportError as error:
        return f"has no cross-entropy kernel that can be imported ({error})"
    while hasattr(kernel, "fn"):  # as Triton wraps it
        kernel = kernel.fn
    parameters = inspect.signature(kernel).parameters
    missing = [name for name in ARGUMENTS if name not in parameters]
    if missing:
        return f"takes no {missing} in its cross-entropy kernel any more"
    wanted = [
        name for name, each in parameters.items() if name not in ARGUMENTS and each.default is inspect.Parameter.empty
    ]
    return f"wants {wanted} in its cross-entropy kernel too" if wanted else None


def _liger():
    """What is used of Liger; imported late, as Triton exists on Linux only."""
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel
    from liger_kernel.ops.utils import device_context

    return liger_cross_entropy_kernel, MAX_FUSED_SIZE, device_context


def _cross_entropy(tile, targets, softcap, loss, accuracy, gradient: bool) -> None:
    """Fill `loss` and, if given, `accuracy`; where `gradient` is set, the tile becomes the gradient of the loss."""
    kernel, largest_block, device_context = _liger()
    tokens, vocabulary = tile.shape
    with device_context(tile.device):
        kernel[(tokens,)](
            X_ptr=tile,
            X_stride=tile.stride(0),
            Y_ptr=targets,
            Y_stride=targets.stride(0),
            loss_ptr=loss,
            loss_stride=loss.stride(0),
            token_accuracy_ptr=accuracy,
            token_accuracy_stride=0 if accuracy is None else accuracy.stride(0),
            n_cols=vocabulary,
            softcap=softcap,
            RETURN_TOKEN_ACCURACY=accuracy is not None,
            HAS_SOFTCAPPING=softcap is not None,
            HAS_GRADIENTS=gradient,
            BLOCK_SIZE=min(largest_block, 1 << (vocabulary - 1).bit_length()),
            num_warps=_warps(tile),
            **CONSTANTS,
        )


def _warps(tile) -> int:
    """As Liger launches this kernel on each device."""
    if torch.version.hip:
        return 16
    blackwell = tile.is_cuda and torch.cuda.get_device_capability(tile.device)[0] >= 10
    return 8 if blackwell and tile.element_size() == 2 else 32
