"""What a preference dataset holds, before one trains on it."""

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from trl_ext.data.advice import Data, Suggestion, advise, why_not
from trl_ext.data.checks import check_count, is_finite_number, require_columns
from trl_ext.data.columns import SCORES, columns_of, list_lengths
from trl_ext.data.groups import check_group, from_groups, is_grouped
from trl_ext.data.keys import content_key
from trl_ext.data.plots import plot_preferences
from trl_ext.data.tokens import pair_lengths, require_chat_template
from trl_ext.losses import list_losses


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SIDES = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """
    Attributes:
        facts (`dict[str, str]`): What there is, in words.
        losses (`dict[str, str]`): For each loss, `""` if the data can train it, else why not.
        remarks (`dict[str, str]`): For a loss that the data can train, what to mind: scores in another unit than it expects.
        lengths (`dict[str, list[int]]`): Of prompts, chosen and rejected completions, in `unit`.
        margins (`list[float]`): Score of the chosen minus that of the rejected completion, where there are scores; of lists of
            them, the mean over reward models.
        unit (`str`): Of lengths: `"tokens"`, as training counts them, or `"words"`.
        deciles (`dict[str, list[float]]`): Of the margins, where there are scores, and of the lengths: the least value, those below which
            10, 20, ... % lie, and the largest.
        advice (`list[Suggestion]`): Which losses to try, why, and what to begin with.
    """

    facts: dict[str, str]
    losses: dict[str, str]
    remarks: dict[str, str]
    lengths: dict[str, list[int]]
    margins: list[float]
    unit: str
    deciles: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    advice: list[Suggestion] = dataclasses.field(default_factory=list)

    def tables(self) -> list:
        """As rich tables: facts, losses, deciles, and what to try."""
        from rich.table import Table
        from rich.text import Text

        facts = Table(title="The data", show_header=False)
        for name, value in self.facts.items():
            facts.add_row(name, value)
        losses = Table(title="Losses that can use it")
        losses.add_column("loss_type", no_wrap=True)
        losses.add_column("can")
        losses.add_column("why not, or what to mind", overflow="fold")
        for name, reason in self.losses.items():
            losses.add_row(name, "no" if reason else "yes", reason or self.remarks.get(name, ""))
        tables = [facts, losses]
        if self.deciles:
            tables.append(Table("share below", *self.deciles, title=f"Deciles (lengths in {self.unit})"))
            for tenth, row in enumerate(zip(*self.deciles.values(), strict=True)):
                tables[-1].add_row(f"{tenth * 10} %", *(f"{value:.4g}" for value in row))
        if self.advice:
            tables.append(Table(title="What to try, the most specific first", show_header=False, show_lines=True))
            tables[-1].add_column(no_wrap=True)
            tables[-1].add_column(overflow="fold")
            for each in self.advice:
                # Text, as intervals in square brackets are no markup
                sources = Text("\n".join(each.sources), style="dim")
                tables[-1].add_row(
                    each.loss, Text("\n").join([Text(each.why), Text(each.flags(), style="bold"), sources])
                )
        return tables

    def to_dict(self) -> dict[str, Any]:
        """All that the tables show, for JSON: `facts`, `losses`, `deciles`, `unit` and `advice`."""
        losses = {
            name: {"can": not reason, "why_not": reason, "remark": self.remarks.get(name, "")}
            for name, reason in self.losses.items()
        }
        advice = [dataclasses.asdict(each) for each in self.advice]
        return {"facts": self.facts, "unit": self.unit, "losses": losses, "deciles": self.deciles, "advice": advice}

    def plot(self, path: str | Path) -> None:
        """Lengths of chosen and rejected completions, and the margins of the scores."""
        plot_preferences(self.lengths, self.margins, self.unit, path)


def inspect_preferences(
    dataset: Dataset, *, processing_class: "PreTrainedTokenizerBase | None" = None, max_length: int = 1024
) -> Inspection:
    """
    Look at a dataset as training would.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs or groups, plain or conversational.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Counts tokens as training does, special ones included; without it words are counted, and nothing is said of
            truncation.
        max_length (`int`, *optional*, defaults to `1024`):
            Tokens of prompt and completion that training keeps.

    Returns:
        [`Inspection`].

    Raises:
        `ValueError`: For data that holds no preferences, or completions of different kinds, for a `max_length` below 1, and for
            conversations where the tokenizer has no chat template.
    """
    check_count("max_length", max_length)
    given = columns_of(dataset, "inspected")
    facts = {"rows": f"{len(dataset):,}", "columns": ", ".join(given)}
    levels = 0
    if is_grouped(dataset.column_names):
        for row, example in enumerate(dataset):
            check_group(example, row, "inspected")
        levels = len({score for row in dataset["scores"] for score in row})
        sizes = [len(row) for row in dataset["completions"]]
        facts["completions per group"] = f"{min(sizes)} to {max(sizes)}"
        dataset = from_groups(dataset, "best_worst", "inspected")
        facts["pairs"] = f"{len(dataset):,}, best against worst"
    require_columns(dataset, ["chosen", "rejected"], " It holds no pairs, and no groups (completions, scores).")
    rows = _pairs(dataset)
    if len(rows) < len(dataset):
        facts["rows without a pair"] = _share(len(dataset) - len(rows), len(dataset))
    conversational = isinstance(rows[0]["chosen"], list)
    if processing_class and conversational:
        require_chat_template(processing_class)
    facts["form"] = "conversational" if conversational else "text"
    texts = [{side: _plain(row.get(side)) for side in SIDES} for row in rows]
    if processing_class:
        counts = [pair_lengths(row, processing_class) for row in rows]
    else:
        counts = [{side: len(row[side].split()) for side in SIDES} for row in texts]
    lengths = {side: [row[side] for row in counts] for side in SIDES}
    unit = "tokens" if processing_class else "words"
    for side, values in lengths.items():
        facts[f"{side}, {unit}"] = _spread(values)
    facts |= _length_bias(lengths)
    if processing_class:
        whole = [row["prompt"] + max(row["chosen"], row["rejected"]) for row in counts]
        facts[f"longer than max_length={max_length}"] = _share(sum(value > max_length for value in whole), len(whole))
        facts["prompt alone fills it (dropped)"] = _share(
            sum(value >= max_length for value in lengths["prompt"]), len(whole)
        )
    facts |= _duplicates(texts)
    margins = _margins(dataset)
    if margins:
        several = list_lengths(dataset, SCORES)
        if several:
            facts["scores of a completion"] = (
                f"{several[SCORES[0]]}, one of each reward model; below stands their mean"
            )
        facts["margins of the scores"] = _quantiles(margins)
        facts["scores contradict the label"] = _share(sum(margin < 0 for margin in margins), len(margins))
        facts["scores tie"] = _share(sum(margin == 0 for margin in margins), len(margins))
    losses = {"sigmoid and TRL's others": ""} | {name: why_not(name, dataset, given) for name in list_losses()}
    deciles = {
        name: [_quantile(values, tenth / 10) for tenth in range(11)]
        for name, values in {"margin": margins, **lengths}.items()
        if values
    }
    advice = advise(Data(dataset, given, losses, margins, lengths, unit, levels))
    return Inspection(facts, losses, _remarks(dataset, margins), lengths, margins, unit, deciles, advice)


def _pairs(dataset: Dataset) -> list[dict[str, Any]]:
    """The rows that have a pair: both completions text, or both messages, as in all others."""
    pairs = []
    for index, row in enumerate(dataset):
        sides = [row["chosen"], row["rejected"]]
        if sides == [None, None]:  # an empty-trace pair may stand alone
            continue
        pairs.append(row)
        first = type(pairs[0]["chosen"])
        if first not in (str, list) or any(type(side) is not first for side in sides):
            raise ValueError(
                f"Row {index}: the completions are {_shown(sides[0])} and {_shown(sides[1])}; expected text, or messages, the same "
                f"in all rows (the first has {_shown(pairs[0]['chosen'])})."
            )
        given = [value for value in (row.get("prompt"), *sides) if value is not None]
        for value in given:
            if type(value) is not first or (first is list and not all(isinstance(each, dict) for each in value)):
                raise ValueError(
                    f"Row {index} has {_shown(value)} beside {_shown(sides[0])}; expected text, or messages, in all columns."
                )
    if not pairs:
        raise ValueError("No row of the dataset has a pair: `chosen` and `rejected` are empty everywhere.")
    return pairs


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(message.get("content") or "") for message in value)
    return value or ""


def _spread(values: list[int]) -> str:
    return f"median {statistics.median(values):g}, 95% {_quantile(values, 0.95)}, most {max(values)}"


def _quantiles(values: list[float]) -> str:
    shown = ", ".join(f"{share:.0%} {_quantile(values, share):.3g}" for share in (0.05, 0.25, 0.5, 0.75, 0.95))
    return f"{shown} (mean {statistics.mean(values):.3g})"


def _quantile(values: list, share: float) -> Any:
    """The value below which that share lies, one of those given."""
    return sorted(values)[int(share * (len(values) - 1))]


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
        "pairs there in both orders": _share(
            sum(key in swapped and row["chosen"] != row["rejected"] for key, row in zip(pairs, texts, strict=True)),
            len(pairs),
        ),
        "chosen equals rejected": _share(sum(row["chosen"] == row["rejected"] for row in texts), len(texts)),
        "an empty completion": _share(
            sum(not row["chosen"].strip() or not row["rejected"].strip() for row in texts), len(texts)
        ),
    }


def _margins(dataset: Dataset) -> list[float]:
    if not set(SCORES) <= set(dataset.column_names):
        return []
    rows = zip(*(map(_one_score, dataset[name]) for name in SCORES), strict=True)
    return [a - b for a, b in rows if is_finite_number(a) and is_finite_number(b)]


def _one_score(score: Any) -> Any:
    """A score, or the mean of a list of them."""
    return (
        statistics.fmean(score) if isinstance(score, list) and score and all(map(is_finite_number, score)) else score
    )


def _remarks(dataset: Dataset, margins: list[float]) -> dict[str, str]:
    """What to mind about losses that can use the scores, but expect them in a unit that they may not have."""
    remarks = {}
    preferred = "preference_prob" in dataset.column_names
    if margins and not list_lengths(dataset, SCORES):
        scores = [value for name in SCORES for value in dataset[name] if is_finite_number(value)]
        if all(value == int(value) for value in scores):
            ratings = (
                "The scores are whole numbers: they look like ratings, not Bradley-Terry logits, the unit expected here. "
                "`trl_ext.data.calibrate` says what to divide them by."
            )
            remarks |= {"margin_adaptive": ratings} | ({} if preferred else {"anchored": ratings})
        relaxed = sum(0 < margin < 1 for margin in margins)
        if relaxed:
            remarks["offset"] = (
                f"{_share(relaxed, len(margins))} pairs have a margin below 1: the logarithm makes their offset negative, so that "
                'less is asked of them than in DPO. Scale the scores up, or set `scaling="linear"`.'
            )
    elif not margins and not preferred:
        remarks["anchored"] = "There are neither scores nor `preference_prob`: all targets are 1, which is plain DPO."
    return remarks
