"""The demonstration's results: a table, a plot and files."""

import csv
import json
from pathlib import Path
from typing import Any

from trl_ext.rounds.report import results_table


COLUMNS = {
    "loss": "loss",
    "data": "data",
    "reward": "reward\nlogits",
    "kl": "KL\nnats",
    "length": "length\ntokens",
    "accuracy": "pairs\nright",
    "seconds": "time\ns",
}


def table(rows: list[dict[str, Any]], title: str):
    """The results as a rich table."""
    caption = "true reward; KL to the start; mean completion length; held-out pairs ranked as labelled; training time"
    return results_table(rows, COLUMNS, 2, title=title, caption=caption)


def save(rows: list[dict[str, Any]], settings: dict[str, Any], folder: Path) -> None:
    """Write `results.json` and `results.csv`."""
    (folder / "results.json").write_text(json.dumps({"settings": settings, "results": rows}, indent=2) + "\n")
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows({column: row.get(column) for column in COLUMNS} for row in rows)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Reward (or, where it is unknown, preference accuracy) against KL, one labelled point per loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric = "reward" if any(row.get("reward") is not None for row in rows) else "accuracy"
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    markers = {"plain": "o", "traced": "s"}
    points = [row for row in rows if row.get(metric) is not None]
    # Points that nearly coincide get their names above one another
    points.sort(key=lambda row: (row["kl"], row[metric]))
    for index, row in enumerate(points):
        axes.scatter(row["kl"], row[metric], marker=markers.get(row["data"], "o"), s=45, zorder=3)
        name = row["loss"] if row["data"] == "plain" else f"{row['loss']} ({row['data']})"
        above = index % 2 == 0
        axes.annotate(
            name, (row["kl"], row[metric]), xytext=(0, 7 if above else -7), textcoords="offset points", fontsize=8,
            ha="center", va="bottom" if above else "top",
        )  # fmt: skip
    axes.margins(0.15)
    axes.set_xlabel("KL to the reference (nats per completion)")
    axes.set_ylabel("true reward (logits)" if metric == "reward" else "preference accuracy (held-out pairs)")
    axes.set_title("What each loss gains, and how far it moves the model")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
