"""What a loss is given: log-probabilities of whole completions, their lengths and the columns of the dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch


def widened(values: torch.Tensor) -> torch.Tensor:
    """
    Values in float32 or wider.

    bf16 has 8 bits: scores of 6.1 and 6.12 would be one there. Scores and columns are tiny, so they are never narrowed, and what
    comes in half precision is at least computed with in float32.
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _there(ref_logps: torch.Tensor | None) -> torch.Tensor:
    if ref_logps is None:
        raise ValueError(
            "The loss asks for the reference (log-ratios and `delta` hold it), but the batch has no log-probabilities of it: a "
            'loss whose `reads` does not hold "ref_logps" is given none. Put it into `reads`, or compute from the policy\'s '
            "log-probabilities alone."
        )
    return ref_logps


@dataclass(frozen=True)
class TokenBatch:
    r"""
    The completions of a [`PreferenceBatch`] token by token, for a loss whose `reads` holds `"token_logps"`.

    Args:
        chosen_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token of the chosen completion under the policy, in nats; 0 where nothing is scored.
        rejected_logps (`torch.Tensor` of shape `(B, T)`):
            The same for the rejected completion.
        ref_chosen_logps (`torch.Tensor` of shape `(B, T)` or `None`):
            The same for the chosen completion under the reference. `None` where no loss in use reads the reference.
        ref_rejected_logps (`torch.Tensor` of shape `(B, T)` or `None`):
            The same for the rejected completion.
        chosen_turns (`torch.Tensor` of shape `(B, T)`):
            Number of the assistant turn that each token of the chosen completion belongs to, from 0; -1 where nothing is
            scored. Integers.
        rejected_turns (`torch.Tensor` of shape `(B, T)`):
            The same for the rejected completion.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor | None
    ref_rejected_logps: torch.Tensor | None
    chosen_turns: torch.Tensor
    rejected_turns: torch.Tensor


@dataclass(frozen=True)
class PreferenceBatch:
    r"""
    A batch of `B` preference pairs.

    Args:
        chosen_logps (`torch.Tensor` of shape `(B,)`):
            Log-probability of the chosen completion under the policy: the sum over its tokens, in nats.
        rejected_logps (`torch.Tensor` of shape `(B,)`):
            The same for the rejected completion.
        ref_chosen_logps (`torch.Tensor` of shape `(B,)` or `None`):
            Log-probability of the chosen completion under the reference, in nats. `None` where no loss in use needs the
            reference: then `chosen_logratios`, `rejected_logratios` and `delta` raise a `ValueError`.
        ref_rejected_logps (`torch.Tensor` of shape `(B,)` or `None`):
            The same for the rejected completion.
        chosen_lengths (`torch.Tensor` of shape `(B,)`):
            Number of chosen completion tokens after truncation, the end-of-sequence token included where it is scored.
        rejected_lengths (`torch.Tensor` of shape `(B,)`):
            The same for the rejected completion.
        beta (`float`, *optional*, defaults to `0.1`):
            DPO temperature: rewards are `beta` times log-ratios.
        columns (`dict[str, torch.Tensor]`, *optional*, defaults to `{}`):
            Numeric dataset columns by name, each of shape `(B,)`. Scores have the shape `(B, M)` where the data holds a list of
            them, one of each of `M` reward models, which is given to losses that state `takes_lists`.
        empty_trace ([`PreferenceBatch`], *optional*):
            The pair that the same prompts gave with reasoning switched off. Rows that have none count 0 tokens there.
        state (`dict[str, torch.Tensor]`, *optional*, defaults to `{}`):
            The state of the loss, by the names that its `init_state` gives.
        tokens ([`TokenBatch`], *optional*):
            The same completions token by token; there for a loss whose `reads` holds `"token_logps"`.
        chosen_divergences (`torch.Tensor` of shape `(B,)`, *optional*):
            Sum, over the tokens of the chosen completion, of what the loss's `per_token` makes of the logits of the policy and of
            its teachers; there for a loss whose `reads` holds `"teachers"`.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor | None
    ref_rejected_logps: torch.Tensor | None
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    beta: float = 0.1
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    empty_trace: "PreferenceBatch | None" = None
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: TokenBatch | None = None
    chosen_divergences: torch.Tensor | None = None

    @cached_property
    def chosen_logratios(self) -> torch.Tensor:
        """`log pi(chosen) - log ref(chosen)`, shape `(B,)`, nats."""
        return self.chosen_logps - _there(self.ref_chosen_logps)

    @cached_property
    def rejected_logratios(self) -> torch.Tensor:
        """`log pi(rejected) - log ref(rejected)`, shape `(B,)`, nats."""
        return self.rejected_logps - _there(self.ref_rejected_logps)

    @cached_property
    def delta(self) -> torch.Tensor:
        """Chosen minus rejected log-ratio, shape `(B,)`, nats: TRL's `delta_score` for reverse KL."""
        return self.chosen_logratios - self.rejected_logratios

    def column(self, name: str, lists: bool = False) -> torch.Tensor:
        """
        The column `name`, in float32 or wider.

        Args:
            name (`str`):
                The column's name.
            lists (`bool`, *optional*, defaults to `False`):
                Whether it may hold lists, shape `(B, M)`, beside numbers, shape `(B,)`: for a loss that states `takes_lists`.

        Raises:
            `ValueError`: If there is no such column, with those that are there; and for lists where numbers are wanted.
        """
        if name not in self.columns:
            raise ValueError(f"The batch has no column {name!r}; its columns are {sorted(self.columns)}.")
        if self.columns[name].dim() > 1 and not lists:
            raise ValueError(
                f"The column {name!r} has shape {tuple(self.columns[name].shape)}: lists, of which a loss that takes one number per "
                "pair could make another objective. Take their mean, or a loss that states `takes_lists`."
            )
        return widened(self.columns[name])


@dataclass(frozen=True)
class GroupBatch:
    r"""
    A batch of `B` prompts with up to `K` scored completions each.

    Args:
        logps (`torch.Tensor` of shape `(B, K)`):
            Log-probability of each completion under the policy: the sum over its tokens, in nats.
        ref_logps (`torch.Tensor` of shape `(B, K)` or `None`):
            The same under the reference. `None` where no loss in use needs it: then `logratios` raises a `ValueError`.
        lengths (`torch.Tensor` of shape `(B, K)`):
            Number of completion tokens after truncation.
        scores (`torch.Tensor` of shape `(B, K)`):
            Score of each completion; higher is better. Losses compute with them in float32 or wider.
        mask (`torch.Tensor` of shape `(B, K)`):
            `False` where a group has fewer than `K` completions. What stands there is not read.
        beta (`float`, *optional*, defaults to `0.1`):
            DPO temperature.
        columns (`dict[str, torch.Tensor]`, *optional*, defaults to `{}`):
            Numeric dataset columns by name, each of shape `(B,)`.
        state (`dict[str, torch.Tensor]`, *optional*, defaults to `{}`):
            The state of the loss, by the names that its `init_state` gives.
        behaviour_logps (`torch.Tensor` of shape `(B, K)`, *optional*):
            Log-probability of each completion under the policy that sampled it, in nats; there for a loss whose `reads`
            holds `"behaviour_logps"`. What stands where `mask` is `False` is not read.
        divergences (`torch.Tensor` of shape `(B, K)`, *optional*):
            Sum, over the tokens of each completion, of what the loss's `per_token` makes of the logits of the policy and of its
            teachers; there for a loss whose `reads` holds `"teachers"`. What stands where `mask` is `False` is not read.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor | None
    lengths: torch.Tensor
    scores: torch.Tensor
    mask: torch.Tensor
    beta: float = 0.1
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    behaviour_logps: torch.Tensor | None = None
    divergences: torch.Tensor | None = None

    @cached_property
    def logratios(self) -> torch.Tensor:
        """`log pi - log ref` of each completion, shape `(B, K)`, nats."""
        return self.logps - _there(self.ref_logps)
