"""The table, the file and the plot."""

import csv
from collections.abc import Sequence
from pathlib import Path

from .metrics import cell, mean_and_spread
from .runs import Run


# Of Okabe and Ito, told apart by the colour-blind too; yellow, which is faint on white, is left out
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")


def table(groups: dict[str, list[Run]], metrics: Sequence[str]):
    """
    Below each metric one line per group: last value, best value where one end is the better one, and last step; with seeds mean
    and standard deviation.
    """
    from rich.table import Table
    from rich.text import Text

    seeds = any(len(runs) > 1 for runs in groups.values())
    shown = Table(caption="mean ± standard deviation over seeds" if seeds else None)
    shown.add_column("run", overflow="fold")
    for heading in [*(["seeds"] if seeds else []), "last", "best", "step"]:
        shown.add_column(heading, justify="right", no_wrap=True)
    for metric in metrics:
        shown.add_section()
        shown.add_row(Text(metric, style="bold"))
        for label, runs in groups.items():
            found = cell(runs, metric)
            count = [str(len(found.last))] if seeds else []
            ends = dict.fromkeys(pick(found.steps) for pick in (min, max) if found.steps)
            steps = "-".join(f"{step:g}" for step in ends)
            shown.add_row(Text(f"  {label}"), *count, _text(found.last), _text(found.best), steps)
    return shown


def _text(values: Sequence[float]) -> str:
    mean, spread = mean_and_spread(values)
    if mean is None:
        return ""
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"


def write_csv(groups: dict[str, list[Run]], metrics: Sequence[str], path: str | Path) -> None:
    """One row per metric and group, unrounded: `metric`, `run`, `seeds`, `last`, `last_spread`, `best`, `best_spread`."""
    try:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["metric", "run", "seeds", "last", "last_spread", "best", "best_spread"])
            for metric in metrics:
                for label, runs in groups.items():
                    found = cell(runs, metric)
                    numbers = (*mean_and_spread(found.last), *mean_and_spread(found.best))
                    writer.writerow(
                        [metric, label, len(found.last), *("" if each is None else each for each in numbers)]
                    )
    except OSError as error:
        raise ValueError(f"Cannot write {str(path)!r}: {error.strerror}.") from error


def plot(groups: dict[str, list[Run]], metrics: Sequence[str], path: str | Path) -> None:
    """Each metric over steps, a panel each; seeds as their mean in a band of one standard deviation, where all of them have run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(metrics), 3)
    lines = -(-len(metrics) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 3.1 * lines + 0.5), layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(metrics) :]:
        panel.remove()
    for metric, panel in zip(metrics, axes.flat, strict=False):
        for number, (label, runs) in enumerate(groups.items()):
            there = [run.series[metric] for run in runs if metric in run.series]
            if not there:
                continue
            steps, values = _on_one_grid(label, metric, there)
            colour = COLOURS[number % len(COLOURS)]
            style = {"color": colour, "linestyle": LINES[number // len(COLOURS) % len(LINES)], "label": label}
            panel.plot(steps, values.mean(axis=0), marker="o" if len(steps) == 1 else None, **style)
            if len(there) > 1:
                mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1)
                panel.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    # Below all panels, where names meet neither lines nor each other
    handles = {
        label: handle
        for panel in figure.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    wide = int(4.4 * columns / (0.075 * max(map(len, handles)) + 0.6))
    names = [label for label in groups if label in handles]
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        fontsize=8,
        ncols=max(1, min(wide, len(names))),
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _on_one_grid(label: str, metric: str, series: list[dict[float, float]]):
    """Steps that lie within all runs, and the runs' values there, between their own steps on a straight line; `(R, S)`."""
    import numpy as np

    first, last = max(min(each) for each in series), min(max(each) for each in series)
    steps = sorted({step for each in series for step in each if first <= step <= last})
    if not steps:
        raise ValueError(
            f"The seeds of {label!r} have no steps of {metric!r} in common: one ends at {last:g}, another begins at {first:g}. "
            "Show each by itself: --group none."
        )
    return steps, np.array([np.interp(steps, list(each), list(each.values())) for each in series])
