"""What the policy of each round wrote, in numbers and as a table."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.data.cache import processes, write_atomically
from trl_ext.data.rewards import JUDGES
from trl_ext.rounds.shaping import text_length


NAMES = {
    "round": "round",
    "mean_score": "score",
    "mean_length": "length\ncharacters",
    "truncated": "truncated",
    "tied": "tied",
    "pairs": "pairs",
    "length_gap": "chosen longer\nby",
    "length_penalty": "length\npenalty",
}
# From which share on a figure is worth a hint; ours, from runs that went wrong
MANY_TRUNCATED, MANY_TIED, MUCH_LONGER = 0.2, 0.5, 0.2


def round_metrics(
    number: int, folder: Path, samples: Dataset, scored: Dataset, pairs: Dataset | None = None, scorer: Any = None
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
            What the round trains on; after the last round there is nothing.
        scorer (`Any`, *optional*):
            What gave the scores. A judge of two compares the completions of a prompt with each other, so their mean is the same
            whatever they are: it is kept as `score_by_construction`.
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
        "tied": sum(len(set(row)) < 2 for row in scored["scores"]) / len(scored),
    }
    if isinstance(scorer, JUDGES):
        metrics["score_by_construction"] = 0.0 if getattr(scorer, "scores", None) == "score" else 0.5
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
    fixed = {value for row in metrics if (value := row.get("score_by_construction")) is not None}
    title = "What the policy wrote at the start of each round, and after the last"
    caption = "".join(f"score: {_by_construction(value)}" for value in fixed)
    return results_table(metrics, NAMES, 3, title=title, caption=caption or None)


def round_table(row: dict[str, Any], title: str):
    """One round as a rich table, a line for each figure, with a hint beside those that are bad."""
    from rich import box
    from rich.table import Table

    shown, said = Table(title=title, box=box.SIMPLE, show_header=False, title_justify="left"), hints(row)
    for name, heading in NAMES.items():
        value = row.get(name)
        if name != "round" and value is not None:
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            shown.add_row(heading.replace("\nchar", ", char").replace("\n", " "), text, said.get(name, ""))
    return shown


def hints(row: dict[str, Any]) -> dict[str, str]:
    """What is wrong with the figures of a round, and what to do, by name."""
    said = {}
    if row.get("score_by_construction") is not None:
        said["mean_score"] = _by_construction(row["score_by_construction"])
    if row["truncated"] == 1:
        said["truncated"] = "all were cut off, and scores are of unfinished texts: raise sampling.max_new_tokens"
    elif row["truncated"] >= MANY_TRUNCATED:
        said["truncated"] = "many were cut off: raise sampling.max_new_tokens, or set drop_truncated: true"
    if row["tied"] == 1:
        said["tied"] = "all prompts: no two completions differ in score, and nothing can be learnt from them"
    elif row["tied"] >= MANY_TIED:
        said["tied"] = (
            "share of prompts that teach nothing: raise num_generations or sampling.temperature, or score more finely"
        )
    if row.get("length_gap", 0.0) > MUCH_LONGER * row["mean_length"]:
        said["length_gap"] = (
            "longer answers win: see training.loss_type length_regularized, and length_shaping: balance"
        )
    return said


def _by_construction(value: float) -> str:
    return (
        f"{value:g} by construction: the judge compares the policy's completions with each other. Only win rates against another policy "
        "say whether it gets better"
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
