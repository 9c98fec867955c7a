"""Micro-batches put together for one generation, and what came of it cut up again."""

import dataclasses
from typing import Any

import torch

from trl_ext.generation import Completions
from trl_ext.trainers.online.rewards import Scores


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Several micro-batches as one: lists and tensors by column."""
    if len(batches) == 1:
        return batches[0]
    return {name: _joined([batch[name] for batch in batches]) for name in batches[0]}


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return [each for value in values for each in value] if isinstance(values[0], (list, tuple)) else values[0]


def slices(sizes: list[int]) -> list[slice]:
    """Where parts of these sizes stand, one after the other."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def completions_of(completions: Completions, prompts: slice) -> Completions:
    """Those of some of the prompts; of all, where there are images."""
    count = len(completions.prompts)
    if range(count)[prompts] == range(count):
        return completions
    numbers = [first + at for first in range(0, len(completions.ids), count) for at in range(count)[prompts]]
    return dataclasses.replace(
        completions,
        prompts=completions.prompts[prompts],
        texts=[completions.texts[number] for number in numbers],
        prompt_ids=completions.prompt_ids[prompts],
        ids=[completions.ids[number] for number in numbers],
        ended=completions.ended[numbers],
    )


def scores_of(scores: Scores, prompts: slice) -> Scores:
    """Those of some of the prompts."""
    if range(len(scores.values))[prompts] == range(len(scores.values)):
        return scores
    return Scores(
        values=scores.values[prompts],
        mask=scores.mask[prompts],
        probabilities=None if scores.probabilities is None else scores.probabilities[prompts],
        per_function={name: values[prompts] for name, values in scores.per_function.items()},
        each=None if scores.each is None else scores.each[prompts],
    )
