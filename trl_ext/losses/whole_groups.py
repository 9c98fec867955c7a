"""What the losses share that learn from whole groups and the policy that sampled them alone."""

import torch

from .base import refuse_values
from .batch import GroupBatch, PreferenceBatch, widened


def check_groups(name: str, batch: GroupBatch | PreferenceBatch) -> None:
    """Raise a `ValueError` for pairs, for groups without log-probs under the policy that sampled, and for scores that are none."""
    if not isinstance(batch, GroupBatch):
        raise ValueError(
            f"{name} learns from whole groups of completions; got a {type(batch).__name__}. Give it a GroupBatch; in a run, set "
            '`pairing="group"`.'
        )
    if batch.behaviour_logps is None:
        raise ValueError(
            f"{name} reads the log-probs under the policy that sampled the completions; the batch has none. Give "
            "`behaviour_logps`, shape (B, K)."
        )
    refuse_values((~batch.scores.isfinite() & batch.mask).any(dim=1), f"{name}: the scores of a group must be finite.")


def per_token(batch: GroupBatch, values: torch.Tensor) -> torch.Tensor:
    """`values`, sums over the tokens of each completion, divided by its length (at least 1); 0 where there is no completion."""
    return values.masked_fill(~batch.mask, 0) / _lengths(batch).clamp(min=1)


def over_tokens(batch: GroupBatch, values: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of a group, shape `(B,)`, of `values` that are means over the tokens of each completion."""
    lengths = _lengths(batch)
    return (values * lengths).sum(dim=1) / lengths.sum(dim=1).clamp(min=1)


def _lengths(batch: GroupBatch) -> torch.Tensor:
    return batch.lengths.masked_fill(~batch.mask, 0)


def behaviour_ratios(batch: GroupBatch) -> torch.Tensor:
    """`log pi - log pi_old` of each completion, per token, in nats, shape `(B, K)`; `pi_old` sampled it."""
    return per_token(batch, batch.logps - batch.behaviour_logps.detach().to(batch.logps.dtype))


def right_ones(batch: GroupBatch, correct: float) -> torch.Tensor:
    """Which completions have a score of at least `correct`, shape `(B, K)`; none where there is no completion."""
    return (widened(batch.scores) >= correct) & batch.mask


def share_of(chosen: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Share of the entries of `among` that are in `chosen` too, of each row, float32, NaN where there are none."""
    dims = tuple(range(1, among.dim()))
    return (chosen & among).sum(dim=dims) / among.sum(dim=dims)


def mean_of(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Mean of the entries of `values` that `among` marks, of each row, detached; NaN where there are none."""
    return values.detach().masked_fill(~among, 0).sum(dim=1) / among.sum(dim=1)
