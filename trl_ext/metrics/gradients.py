"""How noisy gradients are."""

import math
from collections.abc import Iterable

import torch


def gradient_variance(gradients: Iterable[torch.Tensor]) -> dict[str, float]:
    """
    Variance of gradients of a loss over micro-batches (or samples), around their mean.

    Args:
        gradients (`Iterable[torch.Tensor]`):
            One gradient per micro-batch, of any shape, all alike: flattened parameters, or some of them. Two are in memory at a time.

    Returns:
        `dict[str, float]`:

        - `gradient_variance`: trace of the covariance, unbiased: the mean squared distance from the mean gradient times `n / (n - 1)`;
        - `gradient_norm`: of the mean gradient;
        - `noise_scale`: variance over the squared norm of the true gradient, estimated without bias (McCandlish et al. 2018, 2.2):
          about how many micro-batches one would average for a step that is signal as much as noise. Infinite where no signal was found;
        - `count`: of micro-batches.

    Raises:
        `ValueError`: For fewer than two gradients, different shapes, or values that are not finite.
    """
    mean, squares, count = None, 0.0, 0
    for gradient in gradients:
        flat = torch.as_tensor(gradient).detach().flatten().double()
        if mean is not None and flat.shape != mean.shape:
            raise ValueError(
                f"Gradient {count} has {len(flat)} values, the first has {len(mean)}; expected equal shapes."
            )
        if not flat.isfinite().all():
            raise ValueError(f"Gradient {count} holds a value that is not finite.")
        mean = torch.zeros_like(flat) if mean is None else mean
        count += 1
        # Welford's update: no difference of large numbers
        away = flat - mean
        mean += away / count
        squares += torch.dot(away, flat - mean).item()
    if count < 2:
        raise ValueError(f"A variance needs at least two gradients; got {count}.")
    variance, norm = squares / (count - 1), mean.norm().item()
    signal = norm**2 - variance / count
    return {
        "gradient_variance": variance,
        "gradient_norm": norm,
        "noise_scale": variance / signal if signal > 0 else math.inf,
        "count": float(count),
    }
