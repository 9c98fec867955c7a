"""Plots of what data holds, and whether one can be drawn at all. matplotlib is imported where it is used."""

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


BINS = 40
# Share of the values at each end that the axis may leave out, so that a few outliers do not press all others into one bar
LEFT_OUT = 0.005


def check_plot(path: str | Path) -> None:
    """Raise a `ValueError` where a plot could not be written: no matplotlib, no such folder, or an unknown format."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ValueError("A plot needs matplotlib: pip install matplotlib.") from error
    path, formats = Path(path), sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower()[1:] not in formats:
        raise ValueError(f"Cannot draw {str(path)!r}: its name must end in one of {['.' + each for each in formats]}.")
    if not path.parent.is_dir():
        raise ValueError(f"Cannot draw {str(path)!r}: there is no folder {str(path.parent)!r}.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"Cannot draw {str(path)!r}: it cannot be written there.")


def plot_preferences(
    lengths: Mapping[str, Sequence[int]], margins: Sequence[float], unit: str, path: str | Path
) -> None:
    """
    Histograms of the lengths of chosen and rejected completions, and of the margins of their scores.

    Args:
        lengths (`Mapping[str, Sequence[int]]`):
            Of `chosen` and `rejected` completions, in `unit`.
        margins (`Sequence[float]`):
            Score of the chosen minus that of the rejected completion; empty where there are no scores.
        unit (`str`):
            Of lengths: `"tokens"` or `"words"`.
        path (`str` or `Path`):
            File to write; its suffix says the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 2 if margins else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.8), layout="constrained", squeeze=False)
    sides = {side: lengths[side] for side in ("chosen", "rejected")}
    _histogram(axes[0, 0], "Lengths of completions", f"length of completions ({unit})", sides)
    if margins:
        axes[0, 1].axvline(0, color="black", linewidth=1)
        label = "score of the chosen minus that of the rejected completion"
        _histogram(axes[0, 1], "Margins of the scores", label, {"margin": margins})
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _histogram(axes: Any, title: str, label: str, series: Mapping[str, Sequence[float]]) -> None:
    """Bars of each series between the outer quantiles of all, a line at each median, and how many values lie outside."""
    everything = sorted(value for values in series.values() for value in values)
    cut = int(LEFT_OUT * len(everything))
    low, high = everything[cut], everything[len(everything) - 1 - cut]
    outside = sum(not low <= value <= high for value in everything)
    names = [f"{name}, median {statistics.median(values):.4g}" for name, values in series.items()]
    # One list, as a list of one list would be two-dimensional to matplotlib
    values = list(series.values()) if len(series) > 1 else next(iter(series.values()))
    _, _, bars = axes.hist(values, bins=BINS, range=(low, high), label=names if len(series) > 1 else names[0])
    for each, drawn in zip(series.values(), bars if len(series) > 1 else [bars], strict=True):
        color = drawn[0].get_facecolor() if len(series) > 1 else "black"
        axes.axvline(statistics.median(each), color=color, linestyle="--", linewidth=1.5)
    if outside:
        title += f"\n{outside:,} of {len(everything):,} lie outside of the axis, {LEFT_OUT:.1%} at either end"
    axes.set(title=title, xlabel=label, ylabel="pairs")
    axes.legend()
