"""
How well scores explain the labels of preference pairs.

Under Bradley-Terry a pair with margin m, the winner's score minus the loser's, is labelled as it is with probability
sigmoid(m / T). The temperature T that fits best is the unit in which scores are logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset

from trl_ext.data.checks import require_columns


@dataclass(frozen=True)
class Calibration:
    """
    Attributes:
        pairs (`int`): How many.
        accuracy (`float`): Share in which the chosen completion scores more; ties count half.
        contradicted (`float`): Share in which it scores less.
        ties (`float`): Share of equal scores.
        margin_mean (`float`): Mean of the margins, in the scores' unit.
        margin_std (`float`): Their standard deviation.
        temperature (`float` or `None`): The best fit; `None` where there is none (see `remark`).
        nll (`float`): Mean of `-log sigmoid(m)`, in nats: the scores as they are.
        nll_fitted (`float` or `None`): The same at the best temperature.
        remark (`str`): What stands in the way of a fit.
        margins (`list[float]`): The margins, one per pair; left out of `repr`.
    """

    pairs: int
    accuracy: float
    contradicted: float
    ties: float
    margin_mean: float
    margin_std: float
    temperature: float | None
    nll: float
    nll_fitted: float | None
    remark: str
    margins: list[float] = field(repr=False)

    def table(self):
        """As a rich table."""
        from rich.table import Table

        table = Table(title="Scores against labels", show_header=False)
        rows = {
            "pairs": f"{self.pairs}",
            "chosen scores more": f"{self.accuracy:.1%}",
            "labels contradicted": f"{self.contradicted:.1%}",
            "equal scores": f"{self.ties:.1%}",
            "margin": f"{self.margin_mean:.3f} ± {self.margin_std:.3f}",
            "temperature of best fit": "-" if self.temperature is None else f"{self.temperature:.4g}",
            "nats per pair, as they are": f"{self.nll:.4f}",
            "nats per pair, fitted": "-" if self.nll_fitted is None else f"{self.nll_fitted:.4f}",
            "nats per pair, a coin": f"{math.log(2):.4f}",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        if self.remark:
            table.caption = self.remark
        return table

    def plot(self, path: str | Path) -> None:
        """Histogram of the margins."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        axes.hist(self.margins, bins=40)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel("score of the chosen minus that of the rejected completion")
        axes.set_ylabel("pairs")
        axes.set_title(f"{self.accuracy:.0%} of the labels agree")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def calibrate(dataset: Dataset | Sequence[float]) -> Calibration:
    """
    Compare scores with labels.

    Args:
        dataset ([`~datasets.Dataset`] or `Sequence[float]`):
            Pairs with `score_chosen` and `score_rejected`, or their margins.

    Returns:
        [`Calibration`].

    Raises:
        `ValueError`: For no pair at all, scores that are not finite, and scores that are lists.
    """
    margins = _margins(dataset)
    try:
        temperature, remark = fit_temperature(margins), ""
    except ValueError as error:
        temperature, remark = None, str(error)
    values = torch.tensor(margins, dtype=torch.float64)
    return Calibration(
        pairs=len(margins),
        accuracy=((values > 0).double() + (values == 0).double() / 2).mean().item(),
        contradicted=(values < 0).double().mean().item(),
        ties=(values == 0).double().mean().item(),
        margin_mean=values.mean().item(),
        margin_std=values.std(unbiased=False).item(),
        temperature=temperature,
        nll=-F.logsigmoid(values).mean().item(),
        nll_fitted=None if temperature is None else -F.logsigmoid(values / temperature).mean().item(),
        remark=remark,
        margins=margins,
    )


def _margins(dataset: Dataset | Sequence[float]) -> list[float]:
    if isinstance(dataset, Dataset):
        hint = " `trl_ext.data.score_preferences` adds scores."
        require_columns(dataset, ["score_chosen", "score_rejected"], hint)
        scores = list(zip(dataset["score_chosen"], dataset["score_rejected"], strict=True))
        if any(isinstance(score, list) for pair in scores for score in pair):
            raise ValueError(
                "The scores are lists, one number per reward model, and each reward has a temperature of its own. Give the margins "
                "of one: calibrate([a[0] - b[0] for a, b in zip(dataset['score_chosen'], dataset['score_rejected'])])."
            )
        dataset = [a - b for a, b in scores]
    margins = [float(margin) for margin in dataset]
    if not margins or not all(math.isfinite(margin) for margin in margins):
        raise ValueError("Calibration needs at least one pair, and finite scores.")
    return margins


def fit_temperature(margins: Sequence[float]) -> float:
    """
    The temperature T > 0 that minimises the mean of `-log sigmoid(m / T)`.

    Raises:
        `ValueError`: Where there is none: no label is contradicted (T would be 0), or the scores explain the labels no
            better than a coin (T would be infinite or negative).
    """
    values = torch.tensor(_margins(margins), dtype=torch.float64)
    if not (values < 0).any():
        raise ValueError(
            "No temperature fits: no label is contradicted by the scores, so the smaller the better. Fit on pairs that the "
            "reward model has not seen, or give a number."
        )
    if values.mean() <= 0:
        raise ValueError(
            "No temperature fits: the scores explain the labels no better than a coin. Are chosen and rejected swapped?"
        )
    # The slope of the loss in 1 / T increases: bisection in its logarithm
    scale = values.abs().mean()

    def slope(inverse: float) -> float:
        return -(values * torch.sigmoid(-inverse * values)).mean().item()

    low, high = math.log(1e-9 / scale), math.log(1e9 / scale)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)
