"""
Policies at equal KL to their reference: a training is a path of (KL, metric) points, which is read at KLs that several reach.

Reward that is bought with KL is cheap: a loss that moves the model further ends higher, and need not be the better one.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any


# Of the largest KL that all paths reach: where they are read
SHARES = (0.25, 0.5, 1.0)


def at_kl(points: Sequence[dict[str, Any]], kl: float, metric: str = "reward") -> float | None:
    """
    A metric of a path at a KL: linear in the square root of KL between the points, in which reward is nearly a line.

    Args:
        points (`Sequence[dict]`):
            What was measured of one training, in any order: `kl`, nats, and the metric. A KL below 0, which sampling may give,
            counts as 0.
        kl (`float`):
            Nats.
        metric (`str`, *optional*, defaults to `"reward"`):
            Its name in the points.

    Returns:
        `float` or `None`: The value, `None` beyond the end of the path.
    """
    path = sorted((max(point["kl"], 0.0), point[metric]) for point in points)
    if path[-1][0] < kl:
        return None
    after = next(place for place, (reached, _) in enumerate(path) if reached >= kl)
    if after == 0 or path[after][0] == kl:
        return float(path[after][1])
    (left, low), (right, high) = path[after - 1], path[after]
    share = (math.sqrt(kl) - math.sqrt(left)) / (math.sqrt(right) - math.sqrt(left))
    return low + share * (high - low)


def common_kl(paths: Iterable[Sequence[dict[str, Any]]]) -> float:
    """The largest KL that every path reaches, nats."""
    return min(max(max(point["kl"], 0.0) for point in points) for points in paths)


def at_equal_kl(points: Sequence[dict[str, Any]], top: float, metric: str = "reward") -> float:
    """The mean of a metric at a quarter, a half and the whole of a KL that the path reaches, [`at_kl`] each."""
    return fmean(at_kl(points, share * top, metric) for share in SHARES)
