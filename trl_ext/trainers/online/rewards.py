"""Scores of completions: reward functions, reward models and judges, with every answer checked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trl_ext.data.rewards import RewardModel
from trl_ext.data.tokens import template_arguments
from trl_ext.generation import Completions


@dataclass
class Scores:
    """
    What `K` completions of each of `B` prompts are worth.

    Attributes:
        values (`torch.Tensor` of shape `(B, K)`):
            Reward, or with a judge the mean probability of winning against the others.
        mask (`torch.Tensor` of shape `(B, K)`, *optional*):
            `False` where no reward function had an opinion; all have one by default.
        probabilities (`torch.Tensor` of shape `(B, K, K)`, *optional*):
            Probability that the row's completion is preferred to the column's, from a judge.
        per_function (`dict[str, torch.Tensor]`, *optional*):
            Reward of each function, shape `(B, K)`, NaN where it had no opinion.
        each (`torch.Tensor` of shape `(B, K, M)`, *optional*):
            Where the losses take lists of scores: what each of `M` functions adds to `values`, less the penalties.
    """

    values: torch.Tensor
    mask: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    per_function: dict[str, torch.Tensor] = field(default_factory=dict)
    each: torch.Tensor | None = None

    def __post_init__(self):
        if self.mask is None:
            self.mask = torch.ones_like(self.values, dtype=torch.bool)


def call_reward_function(
    name: str,
    function: Callable[..., Sequence[float | None]],
    prompts: list,
    completions: list,
    completion_ids: list[list[int]],
    **columns: Any,
) -> torch.Tensor:
    """
    Rewards of a function, shape `(N,)`, NaN where it answered `None`.

    Raises:
        `ValueError`: If the answer has another length, or holds NaN, infinity or no number.
        `RuntimeError`: If the function raises; its own error is the cause.
    """
    try:
        answer = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
    except Exception as error:
        raise RuntimeError(
            f"The reward function {name!r} raised {type(error).__name__} on {len(prompts)} completions: {error}"
        ) from error
    if answer is None or not hasattr(answer, "__len__") or len(answer) != len(prompts):
        given = f"{len(answer)} values" if hasattr(answer, "__len__") else repr(answer)
        raise ValueError(
            f"The reward function {name!r} returned {given} for {len(prompts)} completions; expected one number (or "
            "None) for each."
        )
    rewards = []
    for index, value in enumerate(answer.tolist() if isinstance(answer, torch.Tensor) else answer):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            number = None
        if number is None or (value is not None and not math.isfinite(number)):
            raise ValueError(
                f"The reward function {name!r} returned {value!r} for the completion {completions[index]!r}; expected a "
                "finite number, or None for no opinion."
            )
        rewards.append(number)
    return torch.tensor(rewards, dtype=torch.float32)


def call_reward_model(
    model: nn.Module, processing_class: Any, prompts: list, completions: list, rows: list[dict[str, Any]]
) -> torch.Tensor:
    """
    First logit of a sequence classifier on prompt and completion, as [`~trl_ext.data.RewardModel`] reads them; shape `(N,)`.

    Args:
        model (`nn.Module`):
            The classifier.
        processing_class (`PreTrainedTokenizerBase`):
            Its own tokenizer.
        prompts (`list`):
            `N` prompts, as text or messages.
        completions (`list`):
            Their completions.
        rows (`list[dict[str, Any]]`):
            The row of the dataset of each, of which `tools` and `chat_template_kwargs` reach the chat template.

    Raises:
        `ValueError`: If an answer is NaN or infinite.
    """
    templates = [template_arguments(row) for row in rows]
    return torch.tensor(RewardModel(model, processing_class)(prompts, completions, templates), dtype=torch.float32)


def call_judge(
    function: Callable[..., Sequence[float]],
    prompts: list,
    first: list,
    second: list,
    templates: list[dict] | None = None,
) -> torch.Tensor:
    """
    Probability that each completion of `first` is preferred to that of `second`, shape `(N,)`. `templates`, arguments of the chat
    template of each prompt, are for a [`~trl_ext.data.PreferenceModel`].

    Raises:
        `ValueError`: If the answer has another length or is no probability.
        `RuntimeError`: If the function raises; its own error is the cause.
    """
    try:
        answer = function(prompts, first, second, *([] if templates is None else [templates]))
    except Exception as error:
        raise RuntimeError(f"`judge` raised {type(error).__name__} on {len(prompts)} comparisons: {error}") from error
    values = torch.as_tensor(answer, dtype=torch.float32).flatten() if answer is not None else torch.empty(0)
    if len(values) != len(prompts):
        raise ValueError(f"`judge` returned {len(values)} values for {len(prompts)} comparisons.")
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"`judge` returned {values[row].item()} for the completions {first[row]!r} and {second[row]!r}; "
            "expected the probability, in [0, 1], that the first is preferred."
        )
    return values


def judge_scores(function: Callable, prompts: list, completions: list, templates: list[dict] | None = None) -> Scores:
    """
    Each two completions of a prompt compared once.

    Args:
        function (`Callable`):
            The judge.
        prompts (`list`):
            `B` prompts.
        completions (`list`):
            `K` blocks of `B` completions.
        templates (`list[dict]`, *optional*):
            Arguments of the chat template of each prompt, for a [`~trl_ext.data.PreferenceModel`].
    """
    b = len(prompts)
    k = len(completions) // b
    if k == 1:
        return Scores(torch.zeros(b, 1))  # nothing to compare
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    answer = call_judge(
        function,
        prompts * len(pairs),
        [completions[i * b + row] for i, _ in pairs for row in range(b)],
        [completions[j * b + row] for _, j in pairs for row in range(b)],
        None if templates is None else templates * len(pairs),
    ).view(len(pairs), b)
    probabilities = torch.full((b, k, k), 0.5)
    for (i, j), values in zip(pairs, answer, strict=True):
        probabilities[:, i, j], probabilities[:, j, i] = values, 1 - values
    wins = (probabilities.sum(dim=2) - 0.5) / (k - 1)
    return Scores(wins, probabilities=probabilities)


def rows_of(inputs: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What each of `count` rows of a batch has for the chat template."""
    names = [name for name in ("tools", "chat_template_kwargs") if name in inputs]
    return [{name: inputs[name][row] for name in names} for row in range(count)]


def reward_scores(trainer: Any, inputs: dict[str, Any], completions: Completions, each: bool = False) -> Scores:
    """
    What the reward functions and models of a trainer say, weighted and added up, less its penalties.

    Args:
        trainer ([`OnlineDPOTrainer`]):
            Has them.
        inputs (`dict[str, Any]`):
            A batch of the dataset: lists by column.
        completions ([`~trl_ext.generation.Completions`]):
            `K` of each of `B` prompts.
        each (`bool`, *optional*, defaults to `False`):
            Whether the losses take a list with each function's share, times its weight and less the penalties as if it were alone.
            A completion has scores then where every function has an opinion.
    """
    prompts, b = completions.prompts, len(completions.prompts)
    k = len(completions.ids) // b
    rows = rows_of(inputs, b)
    columns = {
        name: list(value) * k if isinstance(value, (list, tuple)) else value
        for name, value in inputs.items()
        if name != "prompt"
    }
    ids = [row.tolist() for row in completions.ids]
    rewards: dict[str, torch.Tensor] = {}
    for name, function, tokenizer in zip(
        trainer.reward_func_names, trainer.reward_funcs, trainer.reward_processing_classes, strict=True
    ):
        if isinstance(function, torch.nn.Module):
            # As many at a time as are learnt from together, also where `auto_find_batch_size` has found those to be fewer
            at_once, given = trainer._train_batch_size * k, (prompts * k, completions.texts, rows * k)
            parts = [slice(first, first + at_once) for first in range(0, b * k, at_once)]
            values = torch.cat(
                [call_reward_model(function, tokenizer, *(each[part] for each in given)) for part in parts]
            )
        else:
            values = call_reward_function(
                name, function, prompts * k, completions.texts, ids, trainer_state=trainer.state, **columns
            )
        # Two functions may have one name
        rewards[name if name not in rewards else f"{name}_{len(rewards)}"] = values
    stacked = torch.stack(list(rewards.values()), dim=1)
    weighted = stacked * trainer.reward_weights.cpu()
    totals = torch.cat([weighted.nansum(dim=1, keepdim=True), weighted], dim=1)  # of all functions, and of each
    if trainer.args.missing_eos_penalty is not None:
        totals = totals - trainer.args.missing_eos_penalty * ~completions.ended.cpu().unsqueeze(1)
    if trainer.args.length_penalty:
        totals = totals - trainer.args.length_penalty * torch.tensor([[len(row)] for row in ids])

    def by_prompt(values: torch.Tensor) -> torch.Tensor:
        return values.view(k, b, *values.shape[1:]).transpose(0, 1)

    missing = stacked.isnan()
    return Scores(
        by_prompt(totals[:, 0]),
        by_prompt(~(missing.any(dim=1) if each else missing.all(dim=1))),
        per_function={name: by_prompt(values) for name, values in rewards.items()},
        each=by_prompt(totals[:, 1:]) if each else None,
    )
