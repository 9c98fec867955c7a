"""From scored completions to what the losses are given: which are learnt from, their rows, their batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.utils import pad

from trl_ext.data.pairing import Pairs, pair_up
from trl_ext.generation import Completions
from trl_ext.losses import GroupBatch, PreferenceBatch
from trl_ext.trainers.online.rewards import Scores


@dataclasses.dataclass
class Selection:
    """
    What is learnt from: `M` completions of each of `G` prompts, and the pairs among them.

    Attributes:
        completions ([`~trl_ext.generation.Completions`]): What was generated.
        scores ([`~trl_ext.trainers.online.rewards.Scores`]): What it is worth.
        rows (`torch.Tensor` of shape `(G,)`): Which prompts.
        members (`torch.Tensor` of shape `(G, M)`): Which completions of each.
        pairs ([`~trl_ext.data.pairing.Pairs`] or `None`): Indices into `(G, M)`; `None` where whole groups are learnt from.
    """

    completions: Completions
    scores: Scores
    rows: torch.Tensor
    members: torch.Tensor
    pairs: Pairs | None

    def member_scores(self) -> torch.Tensor:
        """Scores of the members, shape `(G, M)`."""
        return self.scores.values[self.rows].gather(1, self.members)

    def member_mask(self) -> torch.Tensor:
        """Whether a member was scored, shape `(G, M)`."""
        return self.scores.mask[self.rows].gather(1, self.members)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which scored member of each group has the highest score, and which the lowest; both of shape `(G,)`."""
        scores, mask = self.member_scores(), self.member_mask()
        best = scores.masked_fill(~mask, -torch.inf).argmax(dim=1)
        return best, scores.masked_fill(~mask, torch.inf).argmin(dim=1)

    def prompts(self) -> torch.Tensor:
        """Which prompt of the batch each pair, or each group, belongs to; shape `(P,)` or `(G,)`."""
        return self.rows if self.pairs is None else self.rows[self.pairs.group]

    def share(self) -> torch.Tensor:
        """What each pair, or each group, counts: 1 per prompt, whatever its number of pairs; shape `(P,)` or `(G,)`."""
        prompts = self.prompts()
        return 1 / prompts.bincount(minlength=len(self.completions.prompts))[prompts]


def select(completions: Completions, scores: Scores, pairing: str, keep_ties: bool) -> Selection:
    """
    Which completions are learnt from, and which are preferred to which.

    Args:
        completions ([`~trl_ext.generation.Completions`]):
            `K` of each of `B` prompts.
        scores ([`~trl_ext.trainers.online.rewards.Scores`]):
            Theirs.
        pairing (`str`):
            `"best_worst"`, `"all"` or `"group"`.
        keep_ties (`bool`):
            Whether two equal completions form a pair too.
    """
    b, k = scores.values.shape
    device = scores.values.device
    everything = torch.arange(b, device=device), torch.arange(k, device=device)
    if pairing == "group":
        pairs = pair_up(scores.values, scores.mask, "best_worst")  # those with anything to learn
        rows, pairs = pairs.group, None
        members = everything[1].expand(len(rows), k)
    else:
        pairs = pair_up(scores.values, scores.mask, pairing, scores.probabilities, keep_ties)
        if pairing == "best_worst":
            rows, members = pairs.group, torch.stack([pairs.chosen, pairs.rejected], dim=1)
            at = torch.arange(len(rows), device=device)
            pairs = Pairs(at, torch.zeros_like(at), torch.ones_like(at))
        else:
            rows, at = pairs.group.unique(return_inverse=True)
            members, pairs = everything[1].expand(len(rows), k), dataclasses.replace(pairs, group=at)
    if completions.vision is not None and pairs is not None:
        # In some models an image's tensors have no row per completion: all rows stay, in their order
        pairs = Pairs(rows[pairs.group], members[pairs.group, pairs.chosen], members[pairs.group, pairs.rejected])
        rows, members = everything[0], everything[1].expand(b, k)
    return Selection(completions, scores, rows, members, pairs)


def padded_rows(
    selections: list[Selection], max_length: int, pad_token_id: int
) -> tuple[dict[str, torch.Tensor], int, int]:
    """One padded batch of all selected completions, member by member, with the numbers of groups and members."""
    columns = []
    for selection in selections:
        rows, members = selection.rows, selection.members
        if not len(rows):  # one group, of which nothing is learnt
            rows = torch.zeros(1, dtype=torch.long, device=rows.device)
            members = torch.arange(2 if len(selections) == 2 else members.size(1), device=rows.device).unsqueeze(0)
        columns.append([(selection.completions, row, m) for row, m in zip(rows.tolist(), members.tolist())])  # noqa: B905
    groups = [group for column in columns for group in column]
    count = len(groups[0][2])
    ids, masks = [], []
    for member in range(count):
        for completions, row, members in groups:
            answers = [completions.ids[m * len(completions.prompts) + row] for m in members]
            prompt = completions.prompt_ids[row]
            if completions.vision is None:
                # From the left, as TRL does, and alike for all completions of a prompt
                room = max(max_length - max(len(answer) for answer in answers), 0)
                prompt = prompt[max(len(prompt) - room, 0) :]
            answer = answers[member]
            if completions.vision is None:
                answer = answer[:max_length]
            ids.append(torch.cat([prompt, answer]))
            masks.append(torch.cat([torch.zeros_like(prompt), torch.ones_like(answer)]))
    batch = {
        "input_ids": pad(ids, padding_value=pad_token_id, padding_side="right"),
        "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right"),
        "completion_mask": pad(masks, padding_value=0, padding_side="right"),
        **(selections[0].completions.vision or {}),
    }
    return batch, len(groups), count


def build_batch(
    selection: Selection,
    columns: Mapping[str, torch.Tensor],
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    lengths: torch.Tensor,
    beta: float,
    win_rates: bool,
) -> PreferenceBatch | GroupBatch:
    """
    What the losses are given: one row per pair, or per group.

    Args:
        selection ([`Selection`]):
            What is learnt from.
        columns (`dict[str, torch.Tensor]`):
            Columns of the prompts' dataset, each of shape `(B,)`, one value per prompt of the batch.
        logps (`torch.Tensor` of shape `(G, M)`):
            Under the policy, in nats.
        ref_logps (`torch.Tensor` of shape `(G, M)`, *optional*):
            Under the reference, where a loss reads it.
        lengths (`torch.Tensor` of shape `(G, M)`):
            Completion tokens.
        beta (`float`):
            Temperature.
        win_rates (`bool`):
            Whether the scores of a preference oracle, which are win rates, go into the batch beside its probabilities.
    """
    scores = selection.member_scores()
    columns = {name: values[selection.prompts()] for name, values in columns.items()}
    if selection.pairs is None:
        return GroupBatch(logps, ref_logps, lengths, scores, selection.member_mask(), beta=beta, columns=columns)
    g, chosen, rejected = selection.pairs.group, selection.pairs.chosen, selection.pairs.rejected
    probabilities = selection.scores.probabilities
    if probabilities is not None:
        rows, members = selection.rows[g], selection.members
        columns["preference_prob"] = probabilities[rows, members[g, chosen], members[g, rejected]]
    if probabilities is None or win_rates:
        columns |= {"score_chosen": scores[g, chosen], "score_rejected": scores[g, rejected]}
    sides = [
        None if tensor is None else tensor[g, side]
        for tensor in (logps, ref_logps, lengths)
        for side in (chosen, rejected)
    ]
    return PreferenceBatch(*sides, beta=beta, columns=columns)


def join_traces(selections: list[Selection], batches: list[PreferenceBatch]) -> tuple[PreferenceBatch, torch.Tensor]:
    """
    Each prompt's pair with a trace beside its pair without; either may be missing.

    A missing pair has no tokens, and the columns of the other: losses may refuse other values, and nothing comes of them.

    Returns:
        The batch, one row per prompt that has a pair at all, and which prompts these are.
    """
    prompts = torch.cat([selection.rows for selection in selections]).unique()
    at = [torch.searchsorted(prompts, selection.rows) for selection in selections]

    def spread(half: int) -> PreferenceBatch:
        batch, other = batches[half], batches[1 - half]
        whole = _over_rows(batch, lambda value: value.new_zeros(len(prompts)).index_put((at[half],), value))
        columns = {
            name: values.new_zeros(len(prompts))
            .index_put((at[1 - half],), other.columns[name])
            .index_put((at[half],), values)
            for name, values in batch.columns.items()
        }
        return dataclasses.replace(whole, columns=columns)

    return dataclasses.replace(spread(0), empty_trace=spread(1)), prompts


def take(batch: Any, rows: torch.Tensor) -> Any:
    """The rows of a batch that `rows`, shape `(B,)`, marks."""
    return _over_rows(batch, lambda value: value[rows])


def _over_rows(batch: Any, function: Any) -> Any:
    """A batch with `function` applied to all that has one row per pair or group."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    changed = {name: function(value) for name, value in fields.items() if isinstance(value, torch.Tensor)}
    changed["columns"] = {name: function(value) for name, value in batch.columns.items()}
    if fields.get("empty_trace") is not None:
        changed["empty_trace"] = _over_rows(fields["empty_trace"], function)
    return dataclasses.replace(batch, **changed)
