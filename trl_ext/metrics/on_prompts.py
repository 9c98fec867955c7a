"""Metrics of what a policy writes: its own completions of held-out prompts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from trl_ext.data.cache import content_seed
from trl_ext.data.checks import require_columns
from trl_ext.data.preference_model import PreferenceModel
from trl_ext.data.rewards import (
    Ensemble,
    JudgeFunction,
    RewardModel,
    gives_lists,
    read_columns,
    reward_models,
)
from trl_ext.data.sampling import check_prompts, render_prompt
from trl_ext.data.scores import check_columns, check_renderable
from trl_ext.data.tokens import prompt_ids, template_arguments
from trl_ext.generation import Completions
from trl_ext.rounds.shaping import text_length

from .held_out import Answer, sample_answers, score_answers, shared_out
from .intervals import mean_interval, wilson
from .length import length_controlled_win_rate
from .preferences import kl_to_reference, win_rate


REFERENCE = "reference"
COMPARED = ("win_rate", "length_controlled_win_rate")
OF_PROMPTS = ("kl_to_reference", "mean_reward", "mean_length", "ended_share", *COMPARED)


class OnPrompts:
    """
    Prompts, and what is measured of a policy's completions of them.

    Args:
        reward (*optional*):
            What scores one completion, as one of the classes of [`trl_ext.data.rewards`]; by default the trainer's own `score`.
        judge ([`~trl_ext.data.JudgeFunction`] or [`~trl_ext.data.PreferenceModel`], *optional*):
            What compares two.
        trainer, metrics, prompts, baseline, max_new_tokens, batch_size, seed:
            See [`MetricsCallback`].
    """

    def __init__(
        self,
        trainer: Trainer,
        metrics: Sequence[str],
        prompts: Dataset,
        reward: Any,
        judge: JudgeFunction | PreferenceModel | None,
        baseline: str,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
    ):
        check_prompts(prompts)
        images = [name for name in ("image", "images") if name in prompts.column_names]
        if images:
            raise ValueError(f"`prompts` has a column {images[0]!r}: prompts with images cannot be sampled here.")
        self.trainer, self.metrics, self.rows = trainer, metrics, list(prompts)
        self.reward, self.judge, self.baseline = reward, judge, baseline
        self.max_new_tokens, self.batch_size, self.seed = max_new_tokens, batch_size, seed
        self.compares = any(name in COMPARED for name in metrics)
        self.prompt_ids = [
            prompt_ids(
                render_prompt(row, trainer.processing_class, None), trainer._tokenizer, isinstance(row["prompt"], list)
            )
            for row in self.rows
        ]
        self._check_room()
        if baseline != REFERENCE:
            self._check_baseline(prompts)
        check_columns(prompts, read_columns(reward))
        if gives_lists(reward):
            raise ValueError(
                "Several rewards as a list have no mean: give them as `reward_funcs=[...]`, which adds them up."
            )
        for scorer in (reward, judge):
            check_renderable(prompts, scorer)
            for model in reward_models(scorer):
                model.load()
                model.model.to(trainer.accelerator.device)

    def _check_room(self) -> None:
        empty = [row for row, ids in enumerate(self.prompt_ids) if not ids]
        if empty:
            raise ValueError(f"The prompt of row {empty[0]} has no tokens: {self.rows[empty[0]]['prompt']!r}.")
        room = getattr(self.trainer.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, self.prompt_ids))
        if room is not None and longest + self.max_new_tokens > room:
            raise ValueError(
                f"The longest prompt has {longest} tokens; with `max_new_tokens={self.max_new_tokens}` that is more than the {room} "
                "positions of the model."
            )

    def _check_baseline(self, prompts: Dataset) -> None:
        require_columns(prompts, [self.baseline], f" `baseline` is one of them, or {REFERENCE!r}.")
        for number, row in enumerate(self.rows):
            answer = row[self.baseline]
            if not answer or type(answer) is not type(row["prompt"]):
                raise ValueError(
                    f"Row {number}: the answer in {self.baseline!r} is {answer!r}; expected text for a text prompt and messages for "
                    "messages."
                )

    def measure(self) -> dict[str, float]:
        """All metrics by name. Called in every process."""
        rows = shared_out(self.trainer, len(self.rows), self.batch_size, self._measure)
        return self._of_rows(
            {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
        )

    def _measure(self, part: list[int]) -> list[dict[str, float]]:
        rows, ids = [self.rows[index] for index in part], [self.prompt_ids[index] for index in part]
        prompts = [row["prompt"] for row in rows]
        # Of its own for each batch, and not the reference's: equal draws would make the two write alike
        seed = content_seed(self.seed, part)
        answers = sample_answers(self.trainer, prompts, ids, self.max_new_tokens, seed)
        columns: dict[str, Any] = {
            "length": [float(len(answer.ids)) for answer in answers],
            "ended": [float(answer.ended) for answer in answers],
        }
        if "kl_to_reference" in self.metrics:
            logps = score_answers(self.trainer, ids, answers)
            columns |= zip(("logps", "ref_logps"), (values.tolist() for values in logps), strict=True)
        if "mean_reward" in self.metrics or (self.compares and self.judge is None):
            columns["reward"] = self._rewards(rows, ids, answers)
        if self.compares:
            columns |= self._comparison(rows, ids, answers, columns, seed)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _comparison(
        self, rows: list, ids: list, answers: list[Answer], columns: dict[str, list], seed: int
    ) -> dict[str, list]:
        prompts, ours = [row["prompt"] for row in rows], [answer.text for answer in answers]
        if self.baseline == REFERENCE:
            theirs = sample_answers(self.trainer, prompts, ids, self.max_new_tokens, seed + 1, reference=True)
        else:
            theirs = [self._given_answer(row[self.baseline]) for row in rows]
        texts = [answer.text for answer in theirs]
        found = {"characters": list(map(text_length, ours)), "their_characters": list(map(text_length, texts))}
        if self.judge is None:
            rewards = zip(columns["reward"], self._rewards(rows, ids, theirs), strict=True)
            return found | {"preference": [_higher(a, b) for a, b in rewards]}
        templates = [template_arguments(row) for row in rows] if isinstance(self.judge, PreferenceModel) else None
        rest = () if templates is None else (templates,)  # a function sees no template
        return found | {
            "preference": self.judge(prompts, ours, texts, *rest),
            "swapped": [1 - value for value in self.judge(prompts, texts, ours, *rest)],
        }

    def _given_answer(self, answer: Any) -> Answer:
        text = answer if isinstance(answer, str) else "".join(str(each.get("content") or "") for each in answer)
        ids = self.trainer._tokenizer(text, add_special_tokens=False)["input_ids"]
        return Answer(torch.tensor([*ids, self.trainer._tokenizer.eos_token_id]), answer, ended=True)

    def _rewards(self, rows: list[dict], ids: list[list[int]], answers: list[Answer]) -> list[float]:
        """NaN where no reward function of the trainer has an opinion."""
        prompts, texts = [row["prompt"] for row in rows], [answer.text for answer in answers]
        if self.reward is not None:
            return _rewards(self.reward, prompts, texts, rows)
        completions = Completions(
            prompts=prompts,
            texts=texts,
            prompt_ids=[torch.tensor(row) for row in ids],
            ids=[answer.ids for answer in answers],
            ended=torch.tensor([answer.ended for answer in answers]),
        )
        scores = self.trainer.score({name: [row[name] for row in rows] for name in rows[0]}, completions)
        return scores.values.masked_fill(~scores.mask, torch.nan).flatten().tolist()

    def _of_rows(self, rows: dict[str, torch.Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}
        if "kl_to_reference" in self.metrics:
            found |= _named("kl_to_reference", kl_to_reference(rows["logps"], rows["ref_logps"], rows["length"]))
        if "mean_reward" in self.metrics:
            found |= _mean("mean_reward", rows["reward"][~rows["reward"].isnan()])
        if "mean_length" in self.metrics:
            found |= _mean("mean_length", rows["length"])
        if "ended_share" in self.metrics:
            share = rows["ended"].mean().item()
            low, high = wilson(share, len(rows["ended"]))
            found |= {"ended_share": share, "ended_share_low": low, "ended_share_high": high}
        if self.compares:
            found |= self._of_comparisons(rows)
        return found

    def _of_comparisons(self, rows: dict[str, torch.Tensor]) -> dict[str, float]:
        there = ~rows["preference"].isnan()
        rows = {name: values[there] for name, values in rows.items()}
        if not there.any():
            return {}
        found, swapped, preferences = {}, rows.get("swapped"), rows["preference"]
        if "length_controlled_win_rate" in self.metrics:
            mean = preferences if swapped is None else (preferences + swapped) / 2
            values = length_controlled_win_rate(mean, rows["characters"], rows["their_characters"])
            values.pop("average_length")  # in characters, beside `mean_length` in tokens
            found |= _named("length_controlled_win_rate", values)
        if "win_rate" in self.metrics:
            found |= win_rate(preferences, swapped)
        return found


def _named(metric: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{metric}_{name}" if name == "standard_error" else name: value for name, value in values.items()}


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    _, low, high = mean_interval(values)
    return {name: values.mean().item(), f"{name}_low": low, f"{name}_high": high}


def _higher(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else 0.5 * (1 + (a > b) - (a < b))


def _rewards(reward: Any, prompts: list, texts: list, rows: list[dict]) -> list[float]:
    if isinstance(reward, Ensemble):
        members = [_rewards(each, prompts, texts, rows) for each in reward.reward_funcs]
        return [reward.combined(values) for values in zip(*members, strict=True)]
    if isinstance(reward, RewardModel):
        return reward(prompts, texts, [template_arguments(row) for row in rows])
    return reward(prompts, texts, rows)
