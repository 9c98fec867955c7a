"""The head in plain torch, for CPUs and every other device: one tile of logits in memory, worked on in place."""

import torch


def can(transform) -> bool:
    return True


def bytes_per_logit(dtype: torch.dtype) -> int:
    wide = statistics_dtype(dtype)
    return wide.itemsize + (0 if wide == dtype else dtype.itemsize)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def forward(hidden, weight, bias, targets, transform, statistics, rows, gradient_rows=None, keep=False):
    """
    Log-probabilities and statistics of `(N,)` targets; see [`Head`].

    Args:
        gradient_rows (`torch.Tensor` of shape `(N, H)`, *optional*):
            Filled with the gradient of each log-probability with respect to its hidden state.
        keep (`bool`):
            Whether to keep the probabilities for the backward; all tokens are one tile then.

    Returns:
        The fields of [`TokenLogProbs`] as a tuple, and what [`backward`] wants saved.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    wide = statistics_dtype(hidden.dtype)
    new = {"device": hidden.device, "dtype": wide}
    log_probs, log_z = torch.empty(tokens, **new), torch.empty(tokens, **new)
    entropy = torch.empty(tokens, **new) if "entropy" in statistics else None
    log_sum_sq = torch.empty(tokens, **new) if "log_sum_sq_probs" in statistics else None
    mean_logits = torch.empty(tokens, **new) if "mean_logits" in statistics else None
    is_top1 = torch.empty(tokens, device=hidden.device, dtype=torch.bool) if "is_top1" in statistics else None
    mean_row = None
    if mean_logits is not None and transform.softcap is None:
        # The mean of the logits is the logit of the mean row: no pass over the tile
        mean_row = weight.mean(dim=0, dtype=wide)
        mean_bias = 0.0 if bias is None else bias.mean(dtype=wide)

    buffer = torch.empty(min(rows, tokens), vocabulary, **new)
    for start in range(0, tokens, rows):
        here = slice(start, min(start + rows, tokens))
        target = targets[here].unsqueeze(1)
        z, slope = _logits(hidden[here], weight, bias, transform, buffer, slope=gradient_rows is not None)
        if mean_row is not None:
            mean_logits[here] = (hidden[here].to(wide) @ mean_row + mean_bias) * transform.factor
        elif mean_logits is not None:
            mean_logits[here] = z.mean(dim=1)
        target_logit = z.gather(1, target)
        largest = z.amax(dim=1, keepdim=True)
        if is_top1 is not None:
            is_top1[here] = (target_logit == largest).squeeze(1)
        exponentials = z.sub_(largest).exp_()  # in the same memory
        total = exponentials.sum(dim=1, keepdim=True)
        log_z[here] = (largest + total.log()).squeeze(1)
        log_probs[here] = target_logit.squeeze(1) - log_z[here]
        if entropy is not None:
            entropy[here] = torch.special.entr(exponentials / total).sum(dim=1)
        if log_sum_sq is not None:
            norm = torch.linalg.vector_norm(exponentials, dim=1)
            log_sum_sq[here] = 2 * (norm.log() - total.squeeze(1).log())
        if gradient_rows is not None:
            # d log p_target / d z = onehot - p
            gradient = exponentials.div_(total).neg_()
            gradient.scatter_add_(1, target, torch.ones_like(target, dtype=wide))
            _through_transform(gradient, slope, transform)
            gradient_rows[here] = _product(gradient, weight)
        elif keep:
            exponentials.div_(total)
    saved = buffer if keep else log_z
    return (log_probs, entropy, log_sum_sq, mean_logits, is_top1), saved


def backward(upstream, hidden, weight, bias, targets, saved, transform, rows, needs):
    """
    Gradients of hidden states, weight and bias, each `None` where `needs` is false.

    Args:
        upstream (`torch.Tensor` of shape `(N,)`):
            Gradient with respect to each log-probability.
        saved (`torch.Tensor`):
            Probabilities of shape `(N, V)`, which are overwritten, or log-normalisers of shape `(N,)`.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    wide = statistics_dtype(hidden.dtype)
    new = {"device": hidden.device, "dtype": wide}
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.empty(hidden.shape, **new) if needs_hidden else None
    grad_weight = torch.zeros(weight.shape, **new) if needs_weight else None
    grad_bias = torch.zeros(bias.shape, **new) if needs_bias else None
    upstream = upstream.to(wide).unsqueeze(1)
    kept = saved.dim() == 2
    buffer = saved if kept else torch.empty(min(rows, tokens), vocabulary, **new)
    for start in range(0, tokens, rows):
        here = slice(start, min(start + rows, tokens))
        slope = None
        if kept:
            probabilities = buffer
        else:
            z, slope = _logits(hidden[here], weight, bias, transform, buffer, slope=True)
            probabilities = z.sub_(saved[here].unsqueeze(1)).exp_()
        gradient = probabilities.mul_(-upstream[here])
        gradient.scatter_add_(1, targets[here].unsqueeze(1), upstream[here])
        _through_transform(gradient, slope, transform)
        if needs_hidden:
            grad_hidden[here] = _product(gradient, weight)
        if needs_weight:
            _add_product(grad_weight, gradient.t(), hidden[here])
        if needs_bias:
            grad_bias += gradient.sum(dim=0)
    return grad_hidden, grad_weight, grad_bias


def can_keep(transform) -> bool:
    """The derivative of a soft cap needs the logits, so the probabilities alone are not enough."""
    return transform.softcap is None


def _logits(hidden, weight, bias, transform, buffer, slope):
    """A tile of transformed logits, in `buffer`, and where `slope` is set the derivative of the soft cap."""
    z = buffer[: hidden.shape[0]]
    if hidden.dtype == z.dtype:
        torch.mm(hidden, weight.t(), out=z)
    elif z.device.type == "cuda":
        z = torch.mm(hidden, weight.t(), out_dtype=z.dtype)
    else:
        z.copy_(torch.mm(hidden, weight.t()))
    if bias is not None:
        z.add_(bias)
    derivative = None
    if transform.softcap is not None:
        z.mul_(transform.scale / transform.softcap).tanh_()
        if slope:
            derivative = 1 - z * z
        z.mul_(transform.softcap / transform.temperature)
    elif transform.factor != 1.0:
        z.mul_(transform.factor)
    return z, derivative


def _through_transform(gradient, slope, transform) -> None:
    """From the gradient of the transformed logits to that of the product, in place."""
    if slope is not None:
        gradient.mul_(slope)
    if transform.factor != 1.0:
        gradient.mul_(transform.factor)


def _product(gradient, other):
    """`gradient @ other`, accumulated in the dtype of `gradient`, at least float32."""
    if other.dtype == gradient.dtype:
        return torch.mm(gradient, other)
    if gradient.device.type == "cuda":
        return torch.mm(gradient.to(other.dtype), other, out_dtype=gradient.dtype)
    return torch.mm(gradient, other.to(gradient.dtype))


def _add_product(total, gradient, other) -> None:
    """`total += gradient @ other`, without rounding the product to half precision first."""
    if other.dtype != gradient.dtype and gradient.device.type == "cuda":
        torch.addmm(total, gradient.to(other.dtype), other, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient, other.to(total.dtype))
