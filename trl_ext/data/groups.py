"""
Datasets of groups: `prompt`, `completions` (a list) and `scores` (a number for each).

They become pairs by the rules of `pairing.py`, or rows of whole groups: the best completion as `chosen`, the worst as
`rejected`, the rest beside them, so that everything that works on pairs works on groups too.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, Value

from trl_ext.data.checks import is_finite_number
from trl_ext.data.columns import LARGEST
from trl_ext.data.further import FURTHER, in_twos
from trl_ext.data.pairing import pair_up
from trl_ext.data.texts import problem_of_text


logger = logging.getLogger(__name__)

# Of a row that is a whole group: the completions beside best and worst, in twos; and of best, worst and the others in turn the
# scores, and the log-probs under the policy that sampled them
OTHERS = "other_completions"
GROUP_SCORES = "group_scores"
BEHAVIOUR_LOGPS = "behaviour_logps"


def is_grouped(columns: Iterable[str]) -> bool:
    """Whether a dataset holds groups."""
    return {"completions", "scores"} <= set(columns)


def check_group(example: dict[str, Any], row: int, split: str) -> None:
    """Raise a `ValueError` for a row that is no group of at least two completions with a finite score each."""
    completions, scores = example["completions"], example["scores"]
    where = f"Row {row} of the {split} dataset"
    if "prompt" not in example:
        raise ValueError(f"{where} has completions and scores but no 'prompt'; its columns are {sorted(example)}.")
    if not isinstance(completions, (list, tuple)) or not isinstance(scores, (list, tuple)):
        raise ValueError(f"{where}: `completions` and `scores` must be lists, one entry per completion.")
    if len(completions) != len(scores):
        raise ValueError(
            f"{where} has {len(completions)} completions and {len(scores)} scores; give one score for each."
        )
    if len(completions) < 2:
        raise ValueError(f"{where} has {len(completions)} completions; a group needs at least 2. Remove the row.")
    for completion in completions:
        problem = problem_of_text(completion)
        if problem is not None:
            raise ValueError(f"{where} has a completion that {problem}.")
    numbers = {"score": scores}
    if BEHAVIOUR_LOGPS in example:
        logps = numbers[BEHAVIOUR_LOGPS] = example[BEHAVIOUR_LOGPS]
        if not isinstance(logps, (list, tuple)) or len(logps) != len(completions):
            raise ValueError(
                f"{where}: `{BEHAVIOUR_LOGPS}` is {logps!r}; expected a list of {len(completions)} numbers, one per completion."
            )
    for name, values in numbers.items():
        for value in values:
            if name == "score" and isinstance(value, (list, tuple)):
                raise ValueError(
                    f"{where} has the score {value!r}, a list: in a group the score says which completion is preferred, which takes one "
                    "number. Combine the rewards (their mean), or give pairs with lists of scores."
                )
            if not is_finite_number(value) or abs(value) > LARGEST:
                raise ValueError(f"{where} has the {name} {value!r}; expected finite numbers, got {list(values)!r}.")
            if name == BEHAVIOUR_LOGPS and value > 0:
                raise ValueError(
                    f"{where} has the {name} {value!r}; a log-probability is at most 0. Give its logarithm, in nats."
                )


def from_groups(dataset: Dataset | IterableDataset, pairing: str, split: str) -> Dataset | IterableDataset:
    """
    Rows that a pair trainer takes.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Groups; other columns are kept, repeated for each pair.
        pairing (`str`):
            `"best_worst"` and `"all"`: pairs with `score_chosen` and `score_rejected`. `"group"`: one row per group, with
            the columns `other_completions` and `group_scores`; map-style datasets only. Log-probs of the policy that sampled,
            one for each completion in a column `behaviour_logps`, are kept.
        split (`str`):
            What the dataset is called in errors.

    Returns:
        The dataset of pairs. Groups without two different scores are left out, with a warning that counts them.

    Raises:
        `ValueError`: For a row that is no group.
    """
    stream = isinstance(dataset, IterableDataset)
    if stream and pairing == "group":
        raise ValueError(
            f"The {split} dataset is a stream of groups; whole groups need a map-style dataset. Load it without "
            '`streaming=True`, or set `pairing="best_worst"` or "all".'
        )
    columns = list(next(iter(dataset))) if stream else dataset.column_names
    made = [name for name in columns if name in ("chosen", "rejected", "score_chosen", "score_rejected")]
    if made:
        raise ValueError(
            f"The {split} dataset has groups (`completions`, `scores`) and the columns {made}, which are made of them. Remove one "
            "of the two."
        )
    kept = [name for name in columns if name not in ("completions", "scores", BEHAVIOUR_LOGPS)]
    whole = [OTHERS, GROUP_SCORES, *([BEHAVIOUR_LOGPS] if BEHAVIOUR_LOGPS in columns else [])]

    def convert(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        names = [*kept, "chosen", "rejected", "score_chosen", "score_rejected"]
        out: dict[str, list] = {name: [] for name in [*names, *(whole if pairing == "group" else [])]}
        for i, row in enumerate(rows):
            example = {name: values[i] for name, values in batch.items()}
            check_group(example, row, split)
            completions, scores = example["completions"], example["scores"]
            tensor = torch.tensor([scores], dtype=torch.float64)
            pairs = pair_up(
                tensor, torch.ones_like(tensor, dtype=torch.bool), "all" if pairing == "all" else "best_worst"
            )
            for best, worst in zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True):
                for name in kept:
                    out[name].append(example[name])
                out["chosen"].append(completions[best])
                out["rejected"].append(completions[worst])
                out["score_chosen"].append(float(scores[best]))
                out["score_rejected"].append(float(scores[worst]))
                if pairing == "group":
                    rest = [k for k in range(len(scores)) if k not in (best, worst)]
                    out[OTHERS].append(in_twos([completions[k] for k in rest]))
                    out[GROUP_SCORES].append([float(scores[k]) for k in (best, worst, *rest)])
                    if BEHAVIOUR_LOGPS in columns:
                        out[BEHAVIOUR_LOGPS].append([float(example[BEHAVIOUR_LOGPS][k]) for k in (best, worst, *rest)])
        return out

    options: dict[str, Any] = {} if stream else {"desc": f"Pairing completions of the {split} dataset"}
    completion = getattr(dataset.features["completions"], "feature", None) if pairing == "group" else None
    if completion is not None:  # a thousand rows without others would leave open what those of later ones are
        number = Value("float64")
        kinds = {name: dataset.features[name] for name in kept} | dict.fromkeys(("chosen", "rejected"), completion)
        kinds |= dict.fromkeys(("score_chosen", "score_rejected"), number) | {name: [number] for name in whole}
        kinds[OTHERS] = [{"chosen": completion, "rejected": completion}]
        options["features"] = Features(kinds)
    if not stream:
        dropped = sum(
            isinstance(scores, list) and all(each == scores[0] for each in scores) for scores in dataset["scores"]
        )
        if dropped == len(dataset):
            check_group(dataset[0], 0, split)
            raise ValueError(f"No group of the {split} dataset has two different scores: there is nothing to prefer.")
        if dropped:
            logger.warning(
                f"{dropped} of {len(dataset)} groups of the {split} dataset have equal scores only; they are left out."
            )
    return dataset.map(convert, batched=True, with_indices=True, remove_columns=columns, **options)


def refuse_cut_completions(dataset: Dataset, max_length: int | None, split: str) -> None:
    """
    Raise a `ValueError` where truncation would cut a completion whose log-prob under the policy that sampled it is given: that of
    the whole completion, which no longer is the one that is scored.

    Args:
        dataset ([`~datasets.Dataset`]):
            Whole groups as token ids.
        max_length (`int`, *optional*):
            Tokens of prompt and completion that training keeps.
        split (`str`):
            What the dataset is called.
    """
    if max_length is None:
        return

    def longest(row: dict[str, Any]) -> int:
        pairs = [row, *row[FURTHER]]
        return len(row["prompt_ids"]) + max(
            len(pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")
        )

    columns = ["prompt_ids", "chosen_ids", "rejected_ids", FURTHER]
    long = [row for row, example in enumerate(dataset.select_columns(columns)) if longest(example) > max_length]
    if long:
        raise ValueError(
            f"{len(long)} of {len(dataset)} groups of the {split} dataset, the first in row {long[0]}, have completions that "
            f"`max_length={max_length}` cuts, and `{BEHAVIOUR_LOGPS}` are those of whole completions. Raise `max_length`, or remove "
            "the groups."
        )
