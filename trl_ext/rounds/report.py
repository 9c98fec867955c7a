"""What the policy of each round wrote, in numbers and as a table."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.data.cache import processes, write_atomically
from trl_ext.rounds.shaping import text_length


def round_metrics(
    number: int, folder: Path, samples: Dataset, scored: Dataset, pairs: Dataset | None = None
) -> dict[str, Any]:
    """
    What the policy that a round began with wrote, and what became of it; written to `metrics.json` of the folder.

    Args:
        number (`int`):
            Of the round.
        folder (`Path`):
            Of the round.
        samples ([`~datasets.Dataset`]):
            `completions` and `stop_reasons`.
        scored ([`~datasets.Dataset`]):
            `scores`.
        pairs ([`~datasets.Dataset`], *optional*):
            What the round trained on; after the last round there is nothing.
    """
    lengths = [text_length(completion) for row in samples["completions"] for completion in row]
    scores = [score for row in scored["scores"] for score in row]
    reasons = [reason for row in samples["stop_reasons"] for reason in row]
    metrics = {
        "round": number,
        "prompts": len(samples),
        "mean_score": sum(scores) / len(scores),
        "mean_length": sum(lengths) / len(lengths),
        "truncated": sum(reason != "stop" for reason in reasons) / len(reasons),
    }
    if pairs is not None:
        metrics |= {"pairs": len(pairs), **json.loads((folder / "shaping.json").read_text())}
    if pairs is not None and "chosen" in pairs.column_names:
        gaps = [text_length(row["chosen"]) - text_length(row["rejected"]) for row in pairs]
        metrics["length_gap"] = sum(gaps) / len(gaps)
    if processes().is_main_process:
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def table(metrics: list[dict[str, Any]]):
    """The rounds as a rich table."""
    names = {
        "round": "round",
        "mean_score": "score",
        "mean_length": "length\ncharacters",
        "truncated": "truncated",
        "pairs": "pairs",
        "length_gap": "chosen longer\nby",
        "length_penalty": "length\npenalty",
    }
    return results_table(
        metrics, names, 3, title="What the policy wrote at the start of each round, and after the last"
    )


def results_table(rows: list[dict[str, Any]], names: dict[str, str], digits: int, **options: Any):
    """Rows as a rich table, under the names of their keys; a column that no row has is left out."""
    from rich.table import Table

    shown = Table(**options)
    there = [name for name in names if any(row.get(name) is not None for row in rows)]
    for name in there:
        text = any(isinstance(row.get(name), str) for row in rows)
        shown.add_column(names[name], justify="left" if text else "right", no_wrap=text)
    for row in rows:
        values = (row.get(name) for name in there)
        shown.add_row(*(f"{v:.{digits}f}" if isinstance(v, float) else "" if v is None else str(v) for v in values))
    return shown
