"""Statistics of a tile of logits in one pass over it. Imported only where Triton is installed."""

import torch
import triton
import triton.language as tl
from liger_kernel.ops.utils import device_context


BLOCK_SIZE = 1024


@triton.jit
def _kernel(
    x_ptr,
    x_stride,
    entropy_ptr,
    log_sum_sq_ptr,
    mean_ptr,
    n_cols,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    # Sums of e, e * x and e ** 2 with e = exp(x - largest), and of x
    largest = -float("inf")
    total = 0.0
    weighted = 0.0
    squares = 0.0
    plain = 0.0
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < n_cols
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)  # tanh, which leaves the 0 outside at 0
        new = tl.maximum(largest, tl.max(tl.where(inside, x, -float("inf")), axis=0))
        rescale = tl.exp(largest - new)
        e = tl.where(inside, tl.exp(x - new), 0.0)
        total = total * rescale + tl.sum(e, axis=0)
        weighted = weighted * rescale + tl.sum(tl.where(e > 0, e * x, 0.0), axis=0)  # a logit may be -inf
        squares = squares * rescale * rescale + tl.sum(e * e, axis=0)
        plain += tl.sum(x, axis=0)
        largest = new
    tl.store(entropy_ptr + row, largest + tl.log(total) - weighted / total)
    tl.store(log_sum_sq_ptr + row, tl.log(squares) - 2 * tl.log(total))
    tl.store(mean_ptr + row, plain / n_cols)


def statistics(tile: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Entropy, `log(sum_v p_v^2)` and mean of soft-capped logits, float32.

    Args:
        tile (`torch.Tensor` of shape `(n, V)`):
            Logits before the soft cap.
        softcap (`float`, *optional*):
            The soft cap.
    """
    tokens, vocabulary = tile.shape
    results = [torch.empty(tokens, device=tile.device, dtype=torch.float32) for _ in range(3)]
    capped = softcap is not None
    with device_context(tile.device):
        _kernel[(tokens,)](
            tile,
            tile.stride(0),
            *results,
            vocabulary,
            softcap if capped else 1.0,
            HAS_SOFTCAP=capped,
            BLOCK=BLOCK_SIZE,
        )
    return tuple(results)
