"""Confidence intervals: of shares, of means, and of what is computed from many rows."""

import math
import reprlib
import statistics
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch


def check_confidence(confidence: float) -> None:
    """Raise a `ValueError` for a confidence that is none."""
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"`confidence={confidence!r}` must lie between 0 and 1, such as 0.95.")


def values_of(name: str, given: Any, low: float = -math.inf, high: float = math.inf, missing: bool = False) -> Any:
    """
    The numbers of an argument in float64, shape `(N,)`.

    Raises:
        `ValueError`: For an empty argument, more than one dimension, and values that are no finite number in `[low, high]`. Names
            the argument and the row. With `missing`, NaN stands for a value that is not there.
    """
    try:
        given = given.detach().cpu() if isinstance(given, torch.Tensor) else given  # some devices have no float64
        values = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be numbers, one per row; got {reprlib.repr(given)}. {error}") from error
    if values.dim() != 1 or not len(values):
        raise ValueError(
            f"`{name}` has shape {tuple(values.shape)}; expected one number per row, and at least one row."
        )
    bad = ~(values.isfinite() & (values >= low) & (values <= high))
    if missing:
        bad &= ~values.isnan()
    if bad.any():
        row = int(bad.nonzero()[0])
        bounds = f" in [{low:g}, {high:g}]" if math.isfinite(low) else ""
        raise ValueError(f"`{name}` is {values[row].item()!r} in row {row}; expected finite numbers{bounds}.")
    return values


def columns_of(**given: Any) -> list[torch.Tensor]:
    """Several arguments of [`values_of`], which must have as many rows as each other."""
    columns = [values_of(name, value) for name, value in given.items()]
    if len({len(column) for column in columns}) > 1:
        sizes = {name: len(column) for name, column in zip(given, columns, strict=True)}
        raise ValueError(f"The arguments have different numbers of rows: {sizes}.")
    return columns


def normal_quantile(confidence: float) -> float:
    """How many standard errors a two-sided interval reaches to either side."""
    check_confidence(confidence)
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def student_quantile(confidence: float, freedom: int) -> float:
    """How many standard errors a two-sided interval of Student's t reaches to either side, with `freedom` degrees of freedom."""
    check_confidence(confidence)
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the range of the angle whose tangent is t / sqrt(freedom)
        angle = (low + high) / 2
        low, high = (angle, high) if _student(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _student(angle: float, freedom: int) -> float:
    """Probability that |t| is smaller than sqrt(freedom) tan(angle) (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= power / (power + 1) * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def student_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """
    The mean of a few values, such as one per seed, and its interval of Student's t; without bounds for a single value.

    Returns:
        `tuple[float, float, float]`: mean, lower and upper bound.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, -math.inf, math.inf
    reach = student_quantile(confidence, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return mean, mean - reach, mean + reach


def wilson(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's interval of a share of `count` rows (Wilson 1927): it stays in [0, 1], and has a width at 0 and at 1 too.

    Where rows may count half, as ties do, it is somewhat too wide.
    """
    z = normal_quantile(confidence)
    centre, spread = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def mean_interval(values: torch.Tensor, confidence: float = 0.95) -> tuple[float, float, float]:
    """
    Standard error of the mean of `values`, shape `(N,)`, and a normal interval; both NaN and without bounds of a single row.

    Returns:
        `tuple[float, float, float]`: standard error, lower and upper bound.
    """
    if len(values) < 2:
        return math.nan, -math.inf, math.inf
    mean, error = values.mean().item(), (values.std() / math.sqrt(len(values))).item()
    reach = normal_quantile(confidence) * error
    return error, mean - reach, mean + reach


def bootstrap(
    statistic: Callable[..., torch.Tensor],
    columns: Sequence[torch.Tensor],
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Percentile interval of a statistic of rows that are drawn with replacement (Efron 1979).

    Args:
        statistic (`Callable`):
            Takes columns of shape `(draws, N)` and gives one value per draw, shape `(draws,)`; NaN where it has none.
        columns (`Sequence[torch.Tensor]`):
            Of shape `(N,)` each.
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the interval.
        draws (`int`, *optional*, defaults to `2000`):
            How often rows are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws: the same data has the same interval.
    """
    check_confidence(confidence)
    rows = len(columns[0])
    generator = torch.Generator().manual_seed(seed)
    found = []
    size = min(100, max(1, 10**7 // rows))  # no table of all draws at once
    for start in range(0, draws, size):
        index = torch.randint(rows, (min(size, draws - start), rows), generator=generator)
        found.append(statistic(*(column[index] for column in columns)))
    values = torch.cat(found)
    values = values[~values.isnan()]
    if not len(values):
        return math.nan, math.nan
    tails = torch.tensor([0.5 - confidence / 2, 0.5 + confidence / 2], dtype=values.dtype)
    low, high = values.quantile(tails).tolist()
    return low, high
