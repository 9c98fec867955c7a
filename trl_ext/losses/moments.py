"""Running mean and standard deviation over the pairs of all processes: the state of losses that standardise a value."""

from collections.abc import Callable, Mapping

import torch

from .batch import PreferenceBatch, widened


Sums = dict[str, torch.Tensor]


def first_moments() -> Sums:
    """Before the first micro-batch: `mean` and `std` of 0, which are not corrected for later."""
    return {"mean": torch.zeros(()), "std": torch.zeros(())}


def moved_moments(
    state: Mapping[str, torch.Tensor],
    values: torch.Tensor,
    batch: PreferenceBatch,
    momentum: float,
    reduce: Callable[[Sums], Sums],
) -> Sums:
    """
    The moments after a micro-batch: `momentum * old + (1 - momentum) * new`.

    The new ones are the mean and the unbiased standard deviation over the pairs of all processes; pairs without a token, which
    a row that lacks its traced pair has, are left out. A single pair moves the mean alone, and none at all moves nothing. A
    spread that is no larger than the rounding of the values counts as 0.

    Args:
        state (`dict[str, torch.Tensor]`):
            `mean` and `std` before, each of shape `()`.
        values (`torch.Tensor` of shape `(B,)`):
            One value per pair of this process.
        batch ([`PreferenceBatch`]):
            The micro-batch.
        momentum (`float`):
            Share of the old value.
        reduce (`Callable`):
            Adds a dict of tensors up over processes.
    """
    values = widened(values.detach())
    there = ((batch.chosen_lengths > 0) | (batch.rejected_lengths > 0)).to(values.dtype)
    sums = reduce({"values": (there * values).sum(), "count": there.sum()})
    count = sums["count"]
    mean = sums["values"] / count.clamp(min=1)
    # In a second pass: the difference of large squares would be noise
    squares = reduce({"squares": (there * (values - mean) ** 2).sum()})["squares"]
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    std = torch.where(std > 8 * torch.finfo(values.dtype).eps * mean.abs(), std, 0)
    new = {"mean": mean, "std": std}
    known = {"mean": count > 0, "std": count > 1}
    return {
        name: torch.where(known[name], momentum * old + (1 - momentum) * new[name].to(old.dtype), old)
        for name, old in ((name, state[name]) for name in new)
    }


def standardized(values: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`(values - mean) / std` in float32 or wider, without gradient; 0 where `std` is 0."""
    values = widened(values.detach())
    mean, std = state["mean"].to(values), state["std"].to(values)
    return torch.where(std > 0, (values - mean) / torch.where(std > 0, std, 1), 0)


def check_momentum(name: str, momentum: float) -> None:
    """Raise a `ValueError` for the `momentum` of the loss `name` that is not in `[0, 1)`."""
    if not 0 <= momentum < 1:
        raise ValueError(f"{name}: `momentum={momentum}` must lie in [0, 1): at 1 the statistics would stay at 0.")
