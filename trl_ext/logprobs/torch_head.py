"""The head in plain torch, for CPUs and every other device: one tile of logits in memory, worked on in place."""

import torch

from .products import project, statistics_dtype


def can(transform, dtype: torch.dtype) -> bool:
    return True


def tile_dtype(dtype: torch.dtype) -> torch.dtype:
    return statistics_dtype(dtype)


def bytes_per_logit(dtype: torch.dtype) -> int:
    """Of the tile, and in half precision of its copy that goes into products."""
    wide = tile_dtype(dtype)
    return wide.itemsize + (0 if wide == dtype else dtype.itemsize)


def forward_tile(tile, hidden, weight, bias, targets, transform, outputs, gradient: bool) -> None:
    """
    Log-probabilities and statistics of `n` tokens.

    Args:
        tile (`torch.Tensor` of shape `(n, V)`):
            Memory to work in. Where `gradient` is set it holds afterwards `-d log p / d z`, with `z` being what the soft cap,
            if there is one, is applied to: the caller multiplies by the linear part of the transform.
        hidden (`torch.Tensor` of shape `(n, H)`):
            Hidden states.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the head.
        bias (`torch.Tensor` of shape `(V,)` or `None`):
            Bias of the head.
        targets (`torch.Tensor` of shape `(n,)`):
            Token ids.
        transform ([`Transform`]):
            Scale, soft cap and temperature of the logits.
        outputs ([`TokenLogProbs`]):
            Tensors of shape `(n,)` to fill; `None` where a field is not asked for.
        gradient (`bool`):
            Whether the tile is turned into the gradient.
    """
    slope = logits_tile(tile, hidden, weight, bias, transform, gradient)
    target = targets.unsqueeze(1)
    if outputs.mean_logits is not None:
        outputs.mean_logits.copy_(tile.mean(dim=1))
    target_logit = tile.gather(1, target)
    if outputs.is_top1 is not None and hidden.dtype != tile.dtype:
        # Logits that were rounded to half precision tie often, and the first of the largest counts
        largest, first = tile.max(dim=1, keepdim=True)
        outputs.is_top1.copy_((first == target).squeeze(1))
    else:
        largest = tile.amax(dim=1, keepdim=True)  # several times as fast as the maximum with its place
        if outputs.is_top1 is not None:
            outputs.is_top1.copy_((target_logit == largest).squeeze(1))
    tile.sub_(largest)
    weighted = None
    if outputs.entropy is None:
        tile.exp_()
    else:
        exponentials = tile.clamp_(min=-1e4).exp()  # logits of -inf count as nothing
        weighted = tile.mul_(exponentials).sum(dim=1)
        tile.copy_(exponentials)
        del exponentials
    total = tile.sum(dim=1, keepdim=True)
    log_total = total.log()
    outputs.log_probs.copy_((target_logit - (largest + log_total)).squeeze(1))
    if weighted is not None:
        outputs.entropy.copy_(log_total.squeeze(1) - weighted / total.squeeze(1))
    if outputs.log_sum_sq_probs is not None:
        norm = torch.linalg.vector_norm(tile, dim=1)
        outputs.log_sum_sq_probs.copy_(2 * (norm.log() - log_total.squeeze(1)))
    if gradient:
        _less_one_hot(tile.div_(total), target, slope)


def gradient_tile(tile, hidden, weight, bias, targets, transform, log_probs) -> None:
    """The gradient as [`forward_tile`] leaves it in the tile, computed again from the log-probabilities of the targets."""
    slope = logits_tile(tile, hidden, weight, bias, transform, slope=True)
    target = targets.unsqueeze(1)
    log_z = tile.gather(1, target) - log_probs.unsqueeze(1)
    _less_one_hot(tile.sub_(log_z).exp_(), target, slope)


def logits_tile(tile, hidden, weight, bias, transform, slope: bool):
    """Fill the tile with transformed logits; where `slope` is set, return the derivative of the soft cap, if there is one."""
    if transform.softcap is None:
        project(tile, hidden, weight, bias, transform.factor)
        return None
    project(tile, hidden, weight, bias, transform.scale / transform.softcap)
    tile.tanh_()
    derivative = 1 - tile * tile if slope else None
    tile.mul_(transform.softcap / transform.temperature)
    return derivative


def _less_one_hot(probabilities, target, slope) -> None:
    probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=probabilities.dtype))
    if slope is not None:
        probabilities.mul_(slope)
