"""The matrix products of the heads. Products of half precision are summed in float32 wherever the device can."""

import torch


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def project(tile, hidden, weight, bias, factor: float) -> None:
    """`tile = factor * (hidden @ weight.T + bias)`; what `tile` held before is not read."""
    if hidden.dtype == tile.dtype:
        if bias is None:
            torch.addmm(tile, hidden, weight.t(), beta=0, alpha=factor, out=tile)
        else:
            torch.addmm(bias, hidden, weight.t(), beta=factor, alpha=factor, out=tile)
        return
    if tile.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=tile.dtype, out=tile)
    else:
        tile.copy_(torch.mm(hidden, weight.t()))
    if bias is not None:
        tile.add_(bias)
    if factor != 1.0:
        tile.mul_(factor)


def product(tile, other, out) -> None:
    """`out = tile @ other`."""
    if out.dtype == tile.dtype == other.dtype:
        torch.mm(tile, other, out=out)
    elif out.device.type == "cuda":
        torch.mm(tile.to(other.dtype), other, out_dtype=out.dtype, out=out)
    elif tile.dtype == other.dtype and out.device.type != "cpu":
        out.copy_(torch.mm(tile, other))  # other accelerators have half-precision products alone
    else:
        torch.mm(tile.to(out.dtype), other.to(out.dtype), out=out)


def add_product(total, tile, other, dtype: torch.dtype, first: bool) -> None:
    """`total += tile.T @ other` in products of `dtype`; where `first`, what `total` held before is not read."""
    beta = 0 if first else 1
    if total.dtype == dtype:
        torch.addmm(total, tile.t(), other, beta=beta, out=total)
    elif total.device.type == "cuda":
        torch.addmm(total, tile.t().to(dtype), other.to(dtype), out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, tile.t().to(total.dtype), other.to(total.dtype), beta=beta, out=total)
