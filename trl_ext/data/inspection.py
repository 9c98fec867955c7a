"""What a preference dataset holds, before one trains on it."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template

from trl_ext.data.cache import content_key
from trl_ext.data.columns import checked, columns_of, used_columns
from trl_ext.data.groups import from_groups, is_grouped
from trl_ext.losses import get_loss, list_losses


@dataclasses.dataclass(frozen=True)
class Inspection:
    """
    Attributes:
        facts (`dict[str, str]`): What there is, in words.
        losses (`dict[str, str]`): For each loss, `""` if the data can train it, else why not.
        lengths (`dict[str, list[int]]`): Of prompts, chosen and rejected completions.
        margins (`list[float]`): Score of the chosen minus that of the rejected completion, where there are scores.
        unit (`str`): Of lengths: `"tokens"` or `"words"`.
    """

    facts: dict[str, str]
    losses: dict[str, str]
    lengths: dict[str, list[int]]
    margins: list[float]
    unit: str

    def tables(self) -> list:
        """As rich tables: facts, and losses."""
        from rich.table import Table

        facts = Table(title="The data", show_header=False)
        for name, value in self.facts.items():
            facts.add_row(name, value)
        losses = Table(title="Losses that can use it")
        losses.add_column("loss_type", no_wrap=True)
        losses.add_column("can")
        losses.add_column("why not", overflow="fold")
        for name, reason in self.losses.items():
            losses.add_row(name, "no" if reason else "yes", reason)
        return [facts, losses]

    def plot(self, path: str | Path) -> None:
        """Lengths of chosen and rejected completions, and the margins of the scores."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        panels = 2 if self.margins else 1
        figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.5), layout="constrained", squeeze=False)
        sides = [self.lengths["chosen"], self.lengths["rejected"]]
        axes[0, 0].hist(sides, bins=40, label=["chosen", "rejected"])
        axes[0, 0].set_xlabel(f"length of completions ({self.unit})")
        axes[0, 0].legend()
        if self.margins:
            axes[0, 1].hist(self.margins, bins=40)
            axes[0, 1].axvline(0, color="black", linewidth=1)
            axes[0, 1].set_xlabel("score of the chosen minus that of the rejected completion")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def inspect_preferences(
    dataset: Dataset, *, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int = 1024
) -> Inspection:
    """
    Look at a dataset as training would.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs or groups, plain or conversational.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Counts tokens, renders conversations; without it words are counted, and nothing is said of truncation.
        max_length (`int`, *optional*, defaults to `1024`):
            Tokens of prompt and completion that training keeps.

    Returns:
        [`Inspection`].

    Raises:
        `ValueError`: For data that holds no preferences.
    """
    facts = {"rows": f"{len(dataset):,}", "columns": ", ".join(columns_of(dataset, "inspected"))}
    if is_grouped(dataset.column_names):
        sizes = [len(row) for row in dataset["completions"]]
        facts["completions a group"] = f"{min(sizes)} to {max(sizes)}"
        dataset = from_groups(dataset, "best_worst", "inspected")
        facts["pairs"] = f"{len(dataset):,}, best against worst"
    missing = [name for name in ("chosen", "rejected") if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The dataset lacks {missing}: it holds no pairs, and no groups (completions, scores). Its columns are "
            f"{sorted(dataset.column_names)}."
        )
    texts = [_texts(row, tokenizer) for row in dataset]
    facts["form"] = "conversational" if isinstance(dataset[0]["chosen"], list) else "text"

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) if tokenizer else len(text.split())

    lengths = {side: [count(row[side]) for row in texts] for side in ("prompt", "chosen", "rejected")}
    unit = "tokens" if tokenizer else "words"
    for side, values in lengths.items():
        facts[f"{side}, {unit}"] = _spread(values)
    facts |= _length_bias(lengths)
    if tokenizer:
        whole = [
            p + max(c, r) for p, c, r in zip(lengths["prompt"], lengths["chosen"], lengths["rejected"], strict=True)
        ]
        facts[f"longer than max_length={max_length}"] = _share(sum(value > max_length for value in whole), len(whole))
        facts["prompt alone fills it (dropped)"] = _share(
            sum(value >= max_length for value in lengths["prompt"]), len(whole)
        )
    facts |= _duplicates(texts)
    margins = _margins(dataset)
    if margins:
        facts["scores contradict the label"] = _share(sum(margin < 0 for margin in margins), len(margins))
        facts["scores tie"] = _share(sum(margin == 0 for margin in margins), len(margins))
    losses = {"sigmoid and TRL's others": ""} | {name: _why_not(name, dataset) for name in list_losses()}
    return Inspection(facts, losses, lengths, margins, unit)


def _texts(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    parts = {side: row.get(side) for side in ("prompt", "chosen", "rejected")}
    if tokenizer is not None and isinstance(parts["chosen"], list) and parts["prompt"]:
        rendered = apply_chat_template(parts, tokenizer)
        return {side: rendered[side] for side in parts}
    return {side: _plain(value) for side, value in parts.items()}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(message.get("content") or "") for message in value)
    return value or ""


def _spread(values: list[int]) -> str:
    ordered = sorted(values)
    return f"median {statistics.median(values):g}, 95% {ordered[int(0.95 * (len(ordered) - 1))]}, most {ordered[-1]}"


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({count / total:.1%})"


def _length_bias(lengths: dict[str, list[int]]) -> dict[str, str]:
    differences = [c - r for c, r in zip(lengths["chosen"], lengths["rejected"], strict=True)]
    unequal = [difference for difference in differences if difference]
    wins = sum(difference > 0 for difference in unequal)
    facts = {"mean length, chosen minus rejected": f"{statistics.mean(differences):+.1f}"}
    facts["the longer answer wins"] = _share(wins, len(unequal)) if unequal else "never longer"
    return facts


def _duplicates(texts: list[dict[str, str]]) -> dict[str, str]:
    pairs = [content_key(row) for row in texts]
    prompts = {row["prompt"] for row in texts}
    swapped = {content_key({**row, "chosen": row["rejected"], "rejected": row["chosen"]}) for row in texts}
    return {
        "prompts, each once": f"{len(prompts):,}",
        "duplicate pairs": _share(len(pairs) - len(set(pairs)), len(pairs)),
        "pairs there in both orders": _share(sum(key in swapped for key in pairs), len(pairs)),
        "chosen equals rejected": _share(sum(row["chosen"] == row["rejected"] for row in texts), len(texts)),
        "an empty completion": _share(
            sum(not row["chosen"].strip() or not row["rejected"].strip() for row in texts), len(texts)
        ),
    }


def _margins(dataset: Dataset) -> list[float]:
    names = ("score_chosen", "score_rejected")
    if not all(name in dataset.column_names for name in names):
        return []
    values = zip(*(dataset[name] for name in names), strict=True)
    return [a - b for a, b in values if isinstance(a, (int, float)) and isinstance(b, (int, float))]


def _why_not(name: str, dataset: Dataset) -> str:
    """Why a loss with its default hyper-parameters cannot train on the data; as training would say it."""
    try:
        losses = {name: get_loss(name)}
        checked(dataset, used_columns(dataset.column_names, losses, "inspected"), losses, "inspected")
    except (ValueError, TypeError) as error:
        return str(error)
    return ""
