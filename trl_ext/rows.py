"""
The one table that is scored: completions as rows, what is learnt from them as indices into the rows, and their log-probs.

A batch of pairs, of pairs beside pairs without a reasoning trace, of whole groups, online or offline: all are [`Rows`], padded
once and run through the model once, and a [`Plan`], by which [`Scored`] gathers what the losses are given. Data loaders carry
the two as a dict of tensors (`to_batch`), which pins and moves like any other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trl_ext.logprobs import Sequences, SharedPrefixLayout
from trl_ext.losses import GroupBatch, PreferenceBatch, TokenBatch


# Where a batch holds what the model is not called with
TABLE = "table"
ABSENT = -1


@dataclass(frozen=True)
class Rows:
    """
    `N` completions, each after its prompt, in any order.

    Attributes:
        inputs (`dict[str, torch.Tensor]`):
            What the model is called with: `input_ids` and `attention_mask` of shape `(N, T)`, and what a processor adds to them.
        completion_mask (`torch.Tensor` of shape `(N, T)`):
            1 at the tokens to score.
        prompt (`torch.Tensor` of shape `(N,)`):
            Which prompt a row continues: what rows may share.
        partner (`torch.Tensor` of shape `(N,)`):
            The other row of its pair, or the row itself. LD-DPO compares their lengths.
        layout ([`~trl_ext.logprobs.SharedPrefixLayout`], *optional*):
            Where prompts are shared.
        ref_logps (`torch.Tensor` of shape `(N,)`, *optional*):
            Log-probabilities under the reference, in nats, where they are precomputed.
        behaviour_logps (`torch.Tensor` of shape `(N,)`, *optional*):
            Log-probabilities under the policy that sampled the completions, in nats, where they are known beforehand.
        turns (`torch.Tensor` of shape `(N, T)`, *optional*):
            Number of the assistant's turn of each token to score, from 0 in each row, -1 elsewhere. By default each completion is
            one turn.
        keys (`list[bytes]`, *optional*):
            What tells rows apart by their content, wherever they are met again.
    """

    inputs: Mapping[str, torch.Tensor]
    completion_mask: torch.Tensor
    prompt: torch.Tensor
    partner: torch.Tensor
    layout: SharedPrefixLayout | None = None
    ref_logps: torch.Tensor | None = None
    behaviour_logps: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    keys: list[bytes] | None = None

    @classmethod
    def of_pairs(cls, inputs: Mapping[str, torch.Tensor], completion_mask: torch.Tensor, **known: Any) -> "Rows":
        """Rows as TRL's collators order them: the chosen completions of all pairs, then the rejected ones."""
        pairs = torch.arange(len(completion_mask) // 2, device=completion_mask.device)
        prompt = pairs.repeat(2)
        return cls(inputs, completion_mask, prompt, torch.cat([pairs + len(pairs), pairs]), **known)


@dataclass(frozen=True)
class Plan:
    """
    What is learnt from the rows. Indices are rows; -1 stands for a completion that is not there.

    Attributes:
        pairs (`torch.Tensor` of shape `(P, 2)`):
            Chosen and rejected completion. Offline the first `2 P` rows, in TRL's order.
        empty_pairs (`torch.Tensor` of shape `(P, 2)`, *optional*):
            The pairs of the same prompts with reasoning switched off.
        groups (`torch.Tensor` of shape `(G, K)`, *optional*):
            All completions of a prompt.
        scores (`torch.Tensor` of shape `(G, K)`, *optional*):
            Theirs.
        columns (`dict[str, torch.Tensor]`):
            Numeric columns, one value per pair or group, each of shape `(P,)` or `(G,)`.
        empty_columns (`dict[str, torch.Tensor]`, *optional*):
            Those of `empty_pairs`, where they are others.
        share (`torch.Tensor` of shape `(P,)` or `(G,)`, *optional*):
            What each pair or group counts in the mean; 1 by default.
        count (`int`, *optional*):
            What the sum over pairs or groups is divided by to give the mean; their number by default.
    """

    pairs: torch.Tensor
    empty_pairs: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    empty_columns: Mapping[str, torch.Tensor] | None = None
    share: torch.Tensor | None = None
    count: int | None = None


def stacked(tables: Sequence[Rows]) -> Rows:
    """
    Several tables as one, padded to the longest row of all, without a layout and without what is known beforehand.

    Args:
        tables (`Sequence[Rows]`):
            Of texts alone.
    """
    width = max(table.completion_mask.size(1) for table in tables)

    def padded(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([nn.functional.pad(tensor, (0, width - tensor.size(1))) for tensor in tensors])

    prompts, rows, first_prompt, first_row = [], [], 0, 0
    for table in tables:
        prompts.append(table.prompt + first_prompt)
        rows.append(table.partner + first_row)
        first_prompt, first_row = first_prompt + int(table.prompt.max()) + 1, first_row + len(table.prompt)
    return Rows(
        inputs={name: padded([table.inputs[name] for table in tables]) for name in tables[0].inputs},
        completion_mask=padded([table.completion_mask for table in tables]),
        prompt=torch.cat(prompts),
        partner=torch.cat(rows),
    )


def to_batch(rows: Rows, plan: Plan) -> dict[str, Any]:
    """The two as a batch of a data loader: what the model is called with at the top, the rest below `table`."""
    table = {"plan": _filled(plan), **_filled(rows)}
    inputs, mask = table.pop("inputs"), table.pop("completion_mask")
    if rows.layout is not None:
        layout = table["layout"] = _filled(rows.layout)
        if rows.layout.sequences is not None:
            layout["sequences"] = _filled(rows.layout.sequences)
    return {**inputs, "completion_mask": mask, TABLE: table}


def from_batch(batch: Mapping[str, Any]) -> tuple[Rows, Plan]:
    """What [`to_batch`] put together, wherever its tensors have been moved."""
    inputs = {name: value for name, value in batch.items() if name not in ("completion_mask", TABLE)}
    table = dict(batch[TABLE])
    plan = Plan(**table.pop("plan"))
    layout = dict(table.pop("layout", {}))
    if "sequences" in layout:
        layout["sequences"] = Sequences(**layout["sequences"])
    layout = SharedPrefixLayout(**layout) if layout else None
    return Rows(inputs, batch["completion_mask"], layout=layout, **table), plan


def _filled(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not `None`."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Scored:
    """
    What the model says of the rows.

    Attributes:
        logps (`torch.Tensor` of shape `(N,)`):
            Log-probability of each completion under the policy, in nats.
        lengths (`torch.Tensor` of shape `(N,)`):
            Number of scored tokens.
        ref_logps (`torch.Tensor` of shape `(N,)`, *optional*):
            Under the reference, where a loss reads it.
        behaviour_logps (`torch.Tensor` of shape `(N,)`, *optional*):
            Under the policy that sampled, where a loss reads it.
        token_logps (`torch.Tensor` of shape `(N, T)`, *optional*):
            Log-probability of each token, 0 where none is scored, where a loss reads them.
        ref_token_logps (`torch.Tensor` of shape `(N, T)`, *optional*):
            Under the reference, where a loss reads both.
        turns (`torch.Tensor` of shape `(N, T)`, *optional*):
            Number of the assistant turn of each token, -1 where none is scored; beside `token_logps`.
        divergences (`torch.Tensor` of shape `(N,)`, *optional*):
            Sum of what a loss makes of each token's logits and its teachers', where a loss reads teachers; 0 for a completion
            that is not learnt from.
    """

    logps: torch.Tensor
    lengths: torch.Tensor
    ref_logps: torch.Tensor | None = None
    behaviour_logps: torch.Tensor | None = None
    token_logps: torch.Tensor | None = None
    ref_token_logps: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    divergences: torch.Tensor | None = None

    def pair_batch(self, plan: Plan, beta: float) -> PreferenceBatch:
        """What losses on pairs are given; a pair that is not there has no tokens."""
        if plan.empty_pairs is None:
            return self._pairs(plan.pairs, beta, plan.columns, partial=False)
        columns = plan.columns if plan.empty_columns is None else plan.empty_columns
        empty = self._pairs(plan.empty_pairs, beta, columns, partial=True)
        return self._pairs(plan.pairs, beta, plan.columns, partial=True, empty_trace=empty)

    def group_batch(self, plan: Plan, beta: float) -> GroupBatch:
        """What losses on groups are given."""
        known = (_gathered(values, plan.groups, True) for values in (self.logps, self.ref_logps, self.lengths))
        return GroupBatch(
            *known,
            plan.scores,
            plan.groups != ABSENT,
            beta=beta,
            columns=plan.columns,
            behaviour_logps=_gathered(self.behaviour_logps, plan.groups, True),
            divergences=_gathered(self.divergences, plan.groups, True),
        )

    def _pairs(self, pairs: torch.Tensor, beta: float, columns: Mapping, partial: bool, **fields: Any):
        sides = pairs.unbind(1)

        def of(values: torch.Tensor | None, fill: int = 0) -> list[torch.Tensor | None]:
            return [_gathered(values, side, partial, fill) for side in sides]

        if self.token_logps is not None:
            fields["tokens"] = TokenBatch(*of(self.token_logps), *of(self.ref_token_logps), *of(self.turns, fill=-1))
        fields["chosen_divergences"] = of(self.divergences)[0]
        known = (*of(self.logps), *of(self.ref_logps), *of(self.lengths))
        return PreferenceBatch(*known, beta=beta, columns=columns, **fields)


def _gathered(values: torch.Tensor | None, index: torch.Tensor, partial: bool, fill: int = 0) -> torch.Tensor | None:
    """`values` at the rows `index`; `fill` where a row is absent, which only a `partial` index holds."""
    if values is None or not partial:
        return None if values is None else values[index]
    there = (index != ABSENT).view(*index.shape, *(1,) * (values.dim() - 1))
    return torch.where(there, values[index.clamp(min=0)], fill)
