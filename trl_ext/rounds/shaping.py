"""From scored groups to the pairs of a round: filters and length shaping."""

from typing import Any

import torch
from datasets import Dataset

from trl_ext.data.pairing import pair_up


def text_length(completion: Any) -> int:
    """Characters of a completion."""
    return (
        len(completion) if isinstance(completion, str) else sum(len(str(m.get("content") or "")) for m in completion)
    )


def without_empty(row: dict) -> dict:
    """A row of samples without the completions that have no text."""
    kept = [i for i, completion in enumerate(row["completions"]) if text_length(completion)]
    return {name: [row[name][i] for i in kept] for name in ("completions", "stop_reasons")}


def drop_truncated(groups: Dataset) -> Dataset:
    """Groups without the completions that did not end by themselves; groups with fewer than two left are left out."""

    def keep(row: dict) -> dict:
        kept = [i for i, reason in enumerate(row["stop_reasons"]) if reason == "stop"]
        return {name: [row[name][i] for i in kept] for name in ("completions", "scores", "stop_reasons")}

    kept = groups.map(keep).filter(lambda row: len(row["completions"]) >= 2)
    if not len(kept):
        raise ValueError(
            "No prompt has two completions that ended by themselves. Raise `max_new_tokens`, or set `drop_truncated: false`."
        )
    return kept


def balance_lengths(groups: Dataset, step: float = 0.001, largest: float = 1.0) -> tuple[Dataset, float]:
    """
    Length-shaped scores `s - a * characters`, with the `a` that makes chosen and rejected completions equally long.

    DICE (https://huggingface.co/papers/2406.09760) in the form of its authors' code: `a` runs from 0 to `largest` in steps,
    and the one with the smallest absolute difference of mean lengths of best and worst completions is taken.

    Args:
        groups ([`~datasets.Dataset`]):
            Groups with `completions` and `scores`.
        step (`float`, *optional*, defaults to `0.001`):
            Between two values of `a`, in units of the score per character.
        largest (`float`, *optional*, defaults to `1.0`):
            The last one.

    Returns:
        The groups with the new scores, and `a`.
    """
    if not step > 0 or not largest >= step:
        raise ValueError(f"`step={step!r}` must be positive and `largest={largest!r}` no smaller.")
    width = max(len(scores) for scores in groups["scores"])
    mask = torch.tensor([[k < len(row) for k in range(width)] for row in groups["scores"]])
    scores, lengths = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(mask.shape, dtype=torch.float64)
    scores[mask] = torch.tensor([value for row in groups["scores"] for value in row], dtype=torch.float64)
    lengths[mask] = torch.tensor([float(text_length(c)) for row in groups["completions"] for c in row]).double()

    def gap(a: float) -> float:
        pairs = pair_up(scores - a * lengths, mask)
        difference = lengths[pairs.group, pairs.chosen] - lengths[pairs.group, pairs.rejected]
        return difference.mean().abs().item() if len(difference) else float("inf")

    values = [index * step for index in range(int(largest / step + 1e-9) + 1)]
    best = min(values, key=gap)  # the smallest, where several are equal
    shaped = scores - best * lengths
    rows = [shaped[i][mask[i]].tolist() for i in range(len(mask))]
    return groups.remove_columns(["scores"]).add_column("scores", rows), best
