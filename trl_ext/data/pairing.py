"""
From scored completions of a prompt to preference pairs, one implementation for offline groups and online training.

Scores of a group are a row of a `(B, K)` tensor. A pair never joins equal scores: which of two equals would win is no
preference. What does not become a pair is counted by the callers, not lost in silence.
"""

from dataclasses import dataclass

import torch


PAIRINGS = ("best_worst", "all", "group")


@dataclass(frozen=True)
class Pairs:
    """
    `P` pairs among `B` groups of completions.

    Attributes:
        group (`torch.Tensor` of shape `(P,)`): Row of the group.
        chosen (`torch.Tensor` of shape `(P,)`): Column of the preferred completion.
        rejected (`torch.Tensor` of shape `(P,)`): Column of the other.
    """

    group: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor


def pair_up(
    scores: torch.Tensor,
    mask: torch.Tensor,
    pairing: str = "best_worst",
    probabilities: torch.Tensor | None = None,
    keep_ties: bool = False,
) -> Pairs:
    """
    Preference pairs of each group.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`):
            Higher is better.
        mask (`torch.Tensor` of shape `(B, K)`):
            `False` where there is no completion, or none that could be scored.
        pairing (`str`, *optional*, defaults to `"best_worst"`):
            `"best_worst"`: the highest against the lowest score, at most one pair per group. `"all"`: each two completions
            of different scores.
        probabilities (`torch.Tensor` of shape `(B, K, K)`, *optional*):
            Probability that the completion of the row is preferred to that of the column. Decides the order of two
            completions in place of the scores, which then rank for `"best_worst"`.
        keep_ties (`bool`, *optional*, defaults to `False`):
            Whether two equal completions form a pair too: for losses with soft targets, for which 1/2 is a target.

    Returns:
        [`Pairs`], in the order of the groups.
    """
    if pairing == "best_worst":
        best = scores.masked_fill(~mask, -torch.inf).argmax(dim=1)
        # The last of the lowest: with `keep_ties`, equal completions are two different ones
        worst = scores.size(1) - 1 - scores.masked_fill(~mask, torch.inf).flip(1).argmin(dim=1)
        rows = torch.arange(scores.size(0), device=scores.device)
        there = (mask.sum(dim=1) >= 2) & (best != worst)
        if not keep_ties:
            there &= scores[rows, best] > scores[rows, worst]
        return Pairs(rows[there], best[there], worst[there])
    if pairing != "all":
        raise ValueError(f"`pairing={pairing!r}` makes no pairs; use one of {PAIRINGS[:2]}.")
    if probabilities is None:
        order = scores.unsqueeze(2) - scores.unsqueeze(1)
    else:
        order = probabilities - 0.5
    wins = order > 0
    if keep_ties:
        wins |= (order == 0) & torch.ones_like(wins).triu(1)
    wins &= mask.unsqueeze(2) & mask.unsqueeze(1)
    return Pairs(*wins.nonzero(as_tuple=True))
