"""Preference data that several claims are made of."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from .worlds import World, prefer


# Every completion of a group of four is in one pair
TWOS = ((0, 1), (2, 3))


def labelled(groups: Sequence[dict[str, Any]], seed: int, noise: float = 0.0) -> list[dict[str, Any]]:
    """
    Pairs of each group's completions, labelled by Bradley-Terry from the true rewards; a share `noise` of the labels is flipped.

    Each row says with `group`, `first` and `second` which completions these are, chosen first.
    """
    rng = random.Random(seed)
    rows = []
    for number, group in enumerate(groups):
        for a, b in TWOS:
            scores = group["scores"]
            if prefer(rng, scores[a] - scores[b]) == (rng.random() < noise):
                a, b = b, a
            rows.append({
                "prompt": group["prompt"], "chosen": group["completions"][a], "rejected": group["completions"][b],
                "group": number, "first": a, "second": b,
            })  # fmt: skip
    return rows


def pairs(rows: Sequence[dict[str, Any]], *columns: str) -> Dataset:
    """The columns that a trainer reads, and no true reward by accident."""
    return Dataset.from_list(
        [{name: row[name] for name in ("prompt", "chosen", "rejected", *columns)} for row in rows]
    )


def judged(world: World, name: str, rows: Sequence[dict[str, Any]], steps: int) -> Any:
    """
    A function that scores `(prompts, completions)` with a reward model that is trained on these very pairs, labels as they are.
    """
    model = None

    def score(prompts: list, completions: list) -> list[float]:
        nonlocal model
        model = model or world.reward_model(name, pairs(rows), steps)
        found: list[float] = []
        for first in range(0, len(prompts), 64):
            found += model(prompts[first : first + 64], completions[first : first + 64])
        return found

    return score


def scored(world: World, name: str, rows: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The pairs with `score_chosen` and `score_rejected` of a reward model that is trained on them; kept under the name."""

    def make() -> list[list[float]]:
        score = judged(world, name, rows, steps)
        prompts = [row["prompt"] for row in rows]
        return [score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")]

    chosen, rejected = world.kept(f"scores-{name}", make)
    return [{**row, "score_chosen": a, "score_rejected": b} for row, a, b in zip(rows, chosen, rejected, strict=True)]
