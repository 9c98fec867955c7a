"""What an online run logs of a batch, one value per completion, prompt or pair."""

import math

import torch

from trl_ext.generation import Completions
from trl_ext.trainers.online.rewards import Scores
from trl_ext.trainers.online.selection import Selection


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


def dropped_prompts(selection: Selection) -> torch.Tensor:
    """1 for each prompt of the batch of which nothing is learnt, 0 for the others, shape `(B,)`."""
    return torch.ones(len(selection.completions.prompts)).index_fill(0, selection.prompts, 0)
