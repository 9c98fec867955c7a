"""The demonstration's results: a table, a plot and files."""

import csv
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from trl_ext.demo.equal_kl import at_kl, common_kl
from trl_ext.demo.judging import SMALLEST_KL, Estimate, Judged, estimate


SHOWN = {"reward": "reward", "accuracy": "right"}
UNITS = {"reward": "true reward (logits)", "accuracy": "held-out pairs ranked right"}
GAINED = {"reward": "gain in true reward (logits)", "accuracy": "gain in held-out pairs ranked right"}
# Of Okabe and Ito, told apart by the colour-blind too
OURS, THEIRS = "#D55E00", "#0072B2"
PANELS = 3  # beside each other


def rows(judged: list[Judged], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One flat row per loss, after one for the start of each kind of pairs: means over seeds, intervals as `_low` and `_high`."""
    found = []
    for each in judged:
        own = [run for run in runs if run["data"] == each.data]
        starts = {run["seed"]: run["points"][0] for run in own}.values()
        start = {"loss": "start", "data": each.data, "reward": None, "kl": 0.0}
        start[each.metric] = fmean(point[each.metric] for point in starts)
        found.append({**start, "length": fmean(point["length"] for point in starts), "seeds": len(each.seeds)})
        for row in each.rows:
            of_loss = [run for run in own if run["loss"] == row["loss"]]
            flat = {"loss": row["loss"], "data": row["data"], "reward": None, "kl": row["end_kl"].mean}
            flat |= {"length": row["length"], "seeds": row["seeds"]}
            if of_loss[0].get("accuracy") is not None:
                flat["accuracy"] = fmean(run["accuracy"] for run in of_loss)
            flat[each.metric] = row["end"].mean
            for key in ("at_equal_kl", "difference", "gain", "end_difference"):
                flat |= _flat(key, row[key])
            flat["common_kl"] = each.kl
            flat["seconds"] = fmean(run["seconds"] for run in of_loss)
            found.append(flat)
    return found


def _flat(name: str, found: Estimate | None) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = (value if math.isfinite(value) else None for value in (found.low, found.high))
    return {name: found.mean, f"{name}_low": low, f"{name}_high": high}


def table(judged: Judged, rows: list[dict[str, Any]], title: str):
    """The results of one kind of pairs as a rich table, 80 columns wide."""
    from rich.table import Table

    name = SHOWN[judged.metric]
    caption = [f"{UNITS[judged.metric]}, mean ± half a 95 % interval over {len(judged.seeds)} seeds"]
    if len(judged.seeds) == 1:
        caption = [f"{UNITS[judged.metric]}, one seed"]
    if judged.kl > SMALLEST_KL:
        caption.append(f"at equal KL: the mean at {judged.kls} nats, which all runs reach")
    caption.append("end: after training; KL to the start in nats, length in tokens")
    shown = Table(title=title, caption="\n".join(caption))
    shown.add_column("loss", no_wrap=True)
    headings = [f"{name} at\nequal KL", f"less that of\n{judged.baseline}", f"{name},\nend", "KL,\nend", "length"]
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    judged_rows = {row["loss"]: row for row in judged.rows}
    for row in rows:
        found = judged_rows.get(row["loss"], {})
        cells = [_cell(found.get("at_equal_kl")), _cell(found.get("difference"), "+")]
        cells += [f"{row[judged.metric]:.2f}", f"{row['kl']:.2f}", f"{row['length']:.1f}"]
        shown.add_row(row["loss"], *cells)
    return shown


def _cell(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return ""
    return f"{found.mean:{sign}.2f}" + (f" ± {found.reach:.2f}" if math.isfinite(found.reach) else "")


def save(
    rows: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    summary: dict[str, str],
    settings: dict[str, Any],
    folder: Path,
) -> None:
    """Write `results.json`, which has all that was measured, and `results.csv`, the rows."""
    found = {"settings": settings, "summary": summary, "results": rows, "runs": runs}
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot(judged: list[Judged], runs: list[dict[str, Any]], path: Path) -> None:
    """A panel per loss, beside the baseline: gain in reward (where it is unknown, in pairs ranked right) over KL as training goes on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = figure(judged, runs)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def figure(judged: list[Judged], runs: list[dict[str, Any]]):
    """The figure of [`plot`]."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = []
    for each in judged:
        others = [row["loss"] for row in each.rows if row["loss"] != each.baseline]
        panels += [(each, name) for name in others or [each.baseline]]
    columns = min(PANELS, len(panels))
    lines = -(-len(panels) // columns)
    drawn, grid = plt.subplots(
        lines, columns, figsize=(3.4 * columns + 0.6, 2.8 * lines + 0.8), layout="constrained", squeeze=False, sharey=True
    )  # fmt: skip
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for (each, name), axes in zip(panels, grid.flat, strict=False):
        for loss, colour in ((each.baseline, THEIRS), (name, OURS)):
            if loss == name or name != each.baseline:
                paths = [run["points"] for run in runs if (run["loss"], run["data"]) == (loss, each.data)]
                _draw(
                    axes,
                    curve(paths, each.metric),
                    colour,
                    f"{each.baseline}" if colour == THEIRS else "the loss named above",
                )
        if each.kl > SMALLEST_KL:
            axes.axvline(each.kl, color="0.4", linestyle=":", linewidth=1, label="KL that all reach")
        # Reward is nearly a line in the root of KL
        axes.set_xscale("function", functions=(_root, _square))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        plain = each.data == "plain"
        axes.set_title(name if plain else f"{name} ({each.data})", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    _show_means(grid[0, 0])
    metric = judged[0].metric
    drawn.supylabel(GAINED[metric], fontsize=10)
    drawn.supxlabel("KL to the start, nats per completion (root scale)", fontsize=9)
    handles = {
        label: handle for axes in drawn.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    drawn.legend(
        handles.values(), handles.keys(), loc="outside upper center", fontsize=8, ncols=min(len(handles), columns + 1)
    )
    return drawn


def _show_means(axes) -> None:
    """Limits of the shared axis by the curves: the bands of two or three seeds would press them flat."""
    import numpy as np

    lines = [line for each in axes.figure.axes for line in each.lines if len(line.get_ydata()) > 2]
    values = np.concatenate([line.get_ydata() for line in lines])
    margin = 0.4 * (values.max() - values.min()) or 0.1
    axes.set_ylim(values.min() - margin, values.max() + margin)


def _root(values):
    return abs(values) ** 0.5


def _square(values):
    return values**2


def curve(paths: list[list[dict[str, Any]]], metric: str) -> list[tuple[float, Estimate]]:
    """
    KLs up to that which all seeds reach, in even steps of the root, with mean and interval over seeds of what has been gained since
    the start of each: how good the start looks differs between seeds by chance, and is the same for all losses.
    """
    top = common_kl(paths)
    kls = [top * (number / 40) ** 2 for number in range(41)]
    return [(kl, estimate([at_kl(points, kl, metric) - points[0][metric] for points in paths])) for kl in kls]


def _draw(axes, points: list[tuple[float, Estimate]], colour: str, label: str) -> None:
    kls, found = zip(*points, strict=True)
    axes.plot(kls, [each.mean for each in found], color=colour, label=label)
    if math.isfinite(found[0].low):
        lows, highs = [each.low for each in found], [each.high for each in found]
        axes.fill_between(kls, lows, highs, color=colour, alpha=0.2, linewidth=0)
