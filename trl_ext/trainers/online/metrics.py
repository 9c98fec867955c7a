"""What an online run logs of a batch, one value per completion, prompt or pair."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger

from trl_ext.generation import Completions
from trl_ext.trainers.online.rewards import Scores
from trl_ext.trainers.online.selection import Selection


logger = get_logger(__name__)

# Batches of a process in a row of which nothing was learnt, after which the run says so
TIED_BATCHES = 10


def of_completions(completions: Completions, scores: Scores) -> dict[str, torch.Tensor]:
    """One value for each completion that was sampled, by the metric's name."""
    ended = completions.ended.float()
    values = scores.values.double().masked_fill(~scores.mask, math.nan)
    metrics = {
        "completions/mean_length": torch.tensor([float(len(row)) for row in completions.ids]),
        "completions/mean_score": values.flatten(),
        "completions/truncated": 1 - ended,
        "val/contain_eos_token": ended,
    }
    metrics |= {f"rewards/{name}/mean": rewards.flatten() for name, rewards in scores.per_function.items()}
    if scores.per_function:
        metrics["rewards/unscored"] = 1 - scores.mask.flatten().float()
    return metrics


def of_learnt(
    selection: Selection, place: torch.Tensor, logps: torch.Tensor, ref_logps: torch.Tensor | None, beta: float
) -> dict[str, torch.Tensor]:
    """
    One value for each completion or pair that is learnt from, by the metric's name.

    All of `objective/*` but the margin are over the same completions: those that are in a pair or group, once each. So
    `objective/rlhf_reward` is `objective/scores` plus `objective/non_score_reward`.

    Args:
        selection ([`~trl_ext.trainers.online.selection.Selection`]):
            What is learnt from, those alone that count in the loss.
        place (`torch.Tensor` of shape `(K B,)`):
            Row of each completion.
        logps (`torch.Tensor` of shape `(N,)`):
            Of the rows under the policy, in nats.
        ref_logps (`torch.Tensor` of shape `(N,)`, *optional*):
            Under the reference. Without one, `rewards/*` are `beta` times the policy's log-probabilities, as in TRL's CPO, and
            what compares with the reference is left out.
        beta (`float`):
            Temperature.
    """
    members, scores = place[selection.members].to(logps.device), selection.scores_of(selection.members).double()
    chosen, rejected = place[selection.pairs].to(logps.device).unbind(1)
    scores_chosen, scores_rejected = selection.scores_of(selection.pairs).unbind(1)
    logps = logps.detach().double()
    metrics = {
        "objective/entropy": -logps[members],
        "objective/scores": scores,
        "objective/scores_margin": scores_chosen - scores_rejected,
        "logps/chosen": logps[chosen],
        "logps/rejected": logps[rejected],
    }
    rewards = beta * logps
    if ref_logps is not None:
        kl = logps - ref_logps.double()
        rewards = beta * kl
        metrics["objective/kl"] = kl[members]
        metrics["objective/non_score_reward"] = -rewards[members]
        metrics["objective/rlhf_reward"] = scores.to(logps.device) - rewards[members]
    margins = rewards[chosen] - rewards[rejected]
    metrics["rewards/chosen"] = rewards[chosen]
    metrics["rewards/rejected"] = rewards[rejected]
    metrics["rewards/margins"] = margins
    metrics["rewards/accuracies"] = (margins > 0).double()
    return metrics


def without_comparisons(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What of the metrics says something where no completion is preferred to another and none is scored."""
    words = ("score", "chosen", "rejected", "rewards/")
    return {name: value for name, value in metrics.items() if not any(word in name for word in words)}


def dropped_prompts(selection: Selection) -> torch.Tensor:
    """1 for each prompt of the batch of which nothing is learnt, 0 for the others, shape `(B,)`."""
    return torch.ones(len(selection.completions.prompts)).index_fill(0, selection.prompts, 0)


class Ties:
    """Says once in a run that nothing is being learnt."""

    def __init__(self):
        self.batches, self.said = 0, False

    def count(self, learnt: bool) -> None:
        """One batch of this process: whether anything was learnt from it."""
        self.batches = 0 if learnt else self.batches + 1
        if self.batches == TIED_BATCHES:
            self._say(f"{TIED_BATCHES} batches in a row")

    def look(self, logged: dict[str, float]) -> None:
        """The metrics of all processes since the last log."""
        if logged.get("pairs/dropped_prompts") == 1 == logged.get("pairs/dropped_prompts_empty_trace", 1):
            self._say("the steps that were just logged")

    def _say(self, since: str) -> None:
        if self.said:
            return
        self.said = True
        logger.warning(
            f"Nothing was learnt in {since}: all prompts were dropped, because no two of a prompt's completions have different "
            "scores. Likely causes: the reward function gives the same value to every completion, or None (metric "
            "`rewards/unscored`); it looks at something that the completions do not have, such as another form of answer; the "
            "completions of a prompt are alike (a low `temperature`, greedy decoding, a small `max_new_tokens`). Look at some "
            "completions and their scores."
        )
