"""The rows of `gpu.py` as one table, and as plots."""

from pathlib import Path

from common import table


SOURCE = ("device", "driver", "torch", "triton", "transformers", "trl", "liger-kernel", "trl-ext")
# Heading of a note, and the column that it is read from
NOTES = {
    "products": "products",
    "x the bare products": "floor",
    "gradient vs TRL": "gradient_difference",
    "gradient vs float64": "gradient_error",
    "waits of the host": "host_syncs",
    "recompilations": "recompilations",
    "tokens": "tokens",
    "of it generating, s": "generate",
    "learning, TRL = 1": "learn_speed",
    "passed": "passed",
    "failed": "failed",
    "skipped": "skipped",
    "most of it": "bound",
}


def number(value: object) -> float | None:
    """Rows that were read back hold strings."""
    return None if value in (None, "") else float(value)


def line(row: dict) -> dict[str, str]:
    """A row as the table shows it."""
    milliseconds = number(row.get("milliseconds")) or 1e3 * (number(row.get("seconds")) or 0)
    peak = number(row.get("peak_mb"))
    notes = [f"{name} {_shown(row[column])}" for name, column in NOTES.items() if row.get(column) not in (None, "")]
    return {
        "part": row["part"],
        "case": row["case"],
        "path": " ".join(filter(None, [row.get("path"), row.get("mode")])),
        "ms": f"{milliseconds:.2f}" if 0 < milliseconds < 100 else f"{milliseconds:.0f}" if milliseconds else "",
        "speed, TRL = 1": _shown(row.get("speed")),
        "peak GiB": "" if peak is None else f"{peak / 1024:.1f}",
        "memory, TRL = 1": _shown(row.get("memory")),
        "notes": f"FAILED: {row['error']}" if row.get("error") else "; ".join(notes),
    }


def _shown(value: object) -> str:
    text = "" if value is None else str(value)
    try:
        figure = float(text)
    except ValueError:
        return text
    return text if text.isdigit() else f"{figure:.1e}" if 0 < abs(figure) < 1e-2 else f"{figure:.2f}"


def markdown(rows: list[dict], path: Path, model: bool) -> None:
    """One table of all parts, with what ran it in each row."""
    source = ("assumed",) if model else SOURCE
    lines = [{**line(row), **{key: str(row.get(key) or "-") for key in source}} for row in rows]
    text = "**A roofline MODEL. Nothing here was measured.**\n\n" if model else ""
    if lines:
        cells = [list(lines[0]), ["---"] * len(lines[0]), *(list(each.values()) for each in lines)]
        text += "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or "No case has run yet.\n")


def show(rows: list[dict], title: str | None) -> None:
    """The same in a terminal, without notes and versions; of a failure the beginning."""
    lines = [{**line(row), "notes": f"FAILED: {row['error'][:60]}" if row.get("error") else None} for row in rows]
    if lines:
        table(lines, {key: key for key in lines[0]}, title or f"On {rows[0].get('device')}")


def plot_speeds(rows: list[dict], path: Path, title: str | None) -> None:
    """Speed of each path beside TRL's, a bar each; nothing where no row has one."""
    shown = [row for row in rows if row.get("path") != "trl" and row.get("speed") not in (None, "")]
    if not shown:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{row['case']}: {line(row)['path']}" for row in shown]
    figure, axes = plt.subplots(figsize=(10, 1 + 0.22 * len(shown)), layout="constrained")
    axes.barh(labels, [number(row["speed"]) for row in shown])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("speed, TRL = 1")
    axes.set_title(title or str(shown[0].get("device")))
    figure.savefig(path, dpi=100)
    plt.close(figure)
