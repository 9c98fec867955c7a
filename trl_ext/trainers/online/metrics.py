"""What an online run logs: sums and counts, so that a mean is one over all rows of all micro-batches and processes."""

import math
from collections import defaultdict

import torch

from trl_ext.generation import Completions
from trl_ext.trainers.online.rewards import Scores
from trl_ext.trainers.online.selection import Selection


class Means:
    """Means by name, kept as sums and counts until they are asked for."""

    def __init__(self):
        self.sums: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def add(self, name: str, value: float | torch.Tensor, rows: int = 1) -> None:
        """
        Take in one metric of one batch.

        Args:
            name (`str`):
                What it is called.
            value (`float` or `torch.Tensor`):
                A number is a mean over `rows` rows already. A tensor of one or more dimensions has one value per row, NaN where a
                row has none.
            rows (`int`, *optional*, defaults to `1`):
                How much a number counts.
        """
        if isinstance(value, torch.Tensor) and value.dim():
            value = value.detach().double()
            total, count = torch.stack([value.nansum(), (~value.isnan()).sum()]).tolist()
        else:
            number = float(value)
            total, count = (0.0, 0) if math.isnan(number) else (number * rows, rows)
        if count:
            before = self.sums[name]
            self.sums[name] = before[0] + total, before[1] + count

    def over_processes(self) -> dict[str, float]:
        """The means over all processes; one process may lack a metric that another has."""
        everyone = [dict(self.sums)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, dict(self.sums))
        means = {}
        for name in dict.fromkeys(name for each in everyone for name in each):
            totals, counts = zip(*(each[name] for each in everyone if name in each), strict=True)
            means[name] = sum(totals) / sum(counts)
        return means


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
    selection: Selection,
    counted: torch.Tensor,
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    beta: float,
) -> dict[str, torch.Tensor]:
    """
    One value for each completion or pair that is learnt from, by the metric's name.

    All of `objective/*` but the margin are over the same completions: those that are in a counted pair or group, once each.
    So `objective/rlhf_reward` is `objective/scores` plus `objective/non_score_reward`.

    Args:
        selection ([`~trl_ext.trainers.online.selection.Selection`]):
            What is learnt from.
        counted (`torch.Tensor` of shape `(P,)` or `(G,)`):
            Which pairs, or groups, count in the loss.
        logps (`torch.Tensor` of shape `(G, M)`):
            Under the policy, in nats.
        ref_logps (`torch.Tensor` of shape `(G, M)`, *optional*):
            Under the reference. Without one, `rewards/*` are `beta` times the policy's log-probabilities, as in TRL's CPO, and
            what compares with the reference is left out.
        beta (`float`):
            Temperature.
    """
    scores, mask = selection.member_scores(), selection.member_mask()
    logps = logps.detach().double()
    if selection.pairs is None:
        there = mask & counted.unsqueeze(1)
        group = counted.nonzero().squeeze(1)
        chosen, rejected = (end[group] for end in selection.ends())
    else:
        group, chosen, rejected = (
            index[counted] for index in (selection.pairs.group, selection.pairs.chosen, selection.pairs.rejected)
        )
        there = torch.zeros_like(mask)
        there[group, chosen] = there[group, rejected] = True
    metrics = {
        "objective/entropy": -logps[there],
        "objective/scores": scores[there].double(),
        "objective/scores_margin": (scores[group, chosen] - scores[group, rejected]).double(),
        "logps/chosen": logps[group, chosen],
        "logps/rejected": logps[group, rejected],
    }
    rewards = beta * logps
    if ref_logps is not None:
        kl = logps - ref_logps.double()
        rewards = beta * kl
        metrics["objective/kl"] = kl[there]
        metrics["objective/non_score_reward"] = -rewards[there]
        metrics["objective/rlhf_reward"] = metrics["objective/scores"] - rewards[there]
    margins = rewards[group, chosen] - rewards[group, rejected]
    metrics["rewards/chosen"] = rewards[group, chosen]
    metrics["rewards/rejected"] = rewards[group, rejected]
    metrics["rewards/margins"] = margins
    metrics["rewards/accuracies"] = (margins > 0).double()
    return metrics
