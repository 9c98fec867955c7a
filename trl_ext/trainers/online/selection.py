"""From scored completions to the table that is learnt from: which completions, their rows, their pairs and groups."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.utils import pad

from trl_ext.data.columns import WEIGHT
from trl_ext.data.pairing import pair_up
from trl_ext.generation import Completions
from trl_ext.rows import ABSENT, Plan, Rows
from trl_ext.trainers.online.rewards import Scores


@dataclasses.dataclass
class Selection:
    """
    What is learnt from: pairs or groups of the `K B` completions, by their numbers.

    Attributes:
        completions ([`~trl_ext.generation.Completions`]):
            What was generated; completion `k` of prompt `b` is number `k B + b`.
        scores ([`~trl_ext.trainers.online.rewards.Scores`]):
            What it is worth.
        pairs (`torch.Tensor` of shape `(P, 2)`):
            The preferred and the other completion; of a group, the best and the worst.
        groups (`torch.Tensor` of shape `(P, K)`, *optional*):
            Where whole groups are learnt from: their completions, -1 where one has no score.
    """

    completions: Completions
    scores: Scores
    pairs: torch.Tensor
    groups: torch.Tensor | None = None

    @property
    def prompts(self) -> torch.Tensor:
        """Which prompt of the batch each pair or group belongs to, shape `(P,)`."""
        return self.pairs[:, 0] % len(self.completions.prompts)

    @property
    def share(self) -> torch.Tensor:
        """What each pair or group counts: 1 per prompt, whatever its number of pairs; shape `(P,)`."""
        return 1 / self.prompts.bincount()[self.prompts]

    @property
    def members(self) -> torch.Tensor:
        """The completions that are learnt from, once each, shape `(M,)`."""
        numbers = (self.pairs if self.groups is None else self.groups).unique()
        return numbers[numbers != ABSENT]

    def scores_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """Scores of completions, in the shape of their `numbers`; 0 where one is absent."""
        return torch.where(numbers == ABSENT, 0, self.scores.values.cpu().T.flatten()[numbers])

    def rewards_of_pairs(self) -> torch.Tensor:
        """What losses read of the pairs: their scores, shape `(P, 2)`, or lists of them, shape `(P, 2, M)`."""
        each = self.scores.each
        return self.scores_of(self.pairs) if each is None else each.cpu().transpose(0, 1).flatten(0, 1)[self.pairs]

    def only(self, kept: torch.Tensor) -> "Selection":
        """The pairs or groups that `kept`, shape `(P,)`, marks."""
        groups = None if self.groups is None else self.groups[kept]
        return dataclasses.replace(self, pairs=self.pairs[kept], groups=groups)


@dataclasses.dataclass
class Table:
    """
    What is learnt from, as rows, on the host.

    Attributes:
        rows ([`~trl_ext.rows.Rows`]):
            Completions.
        plan ([`~trl_ext.rows.Plan`]):
            What is learnt from them.
        places (`list[torch.Tensor]`):
            For each selection the row of each completion.
        selections (`list[Selection]`):
            Without what has the weight 0.
        dropped (`list[torch.Tensor]`):
            For each selection the prompts of which nothing is learnt.
    """

    rows: Rows
    plan: Plan
    places: list[torch.Tensor]
    selections: list[Selection]
    dropped: list[torch.Tensor]


def select(
    completions: Completions, scores: Scores, pairing: str, keep_ties: bool = False, whole_groups: bool = False
) -> Selection:
    """
    Which completions are learnt from, and which are preferred to which.

    Args:
        completions ([`~trl_ext.generation.Completions`]):
            `K` of each of `B` prompts.
        scores ([`~trl_ext.trainers.online.rewards.Scores`]):
            Theirs.
        pairing (`str`):
            `"best_worst"`, `"all"` or `"group"`.
        keep_ties (`bool`, *optional*, defaults to `False`):
            Whether two equal completions form a pair too.
        whole_groups (`bool`, *optional*, defaults to `False`):
            Whether a group whose completions are all equal is learnt from too.
    """
    values, mask = scores.values.cpu(), scores.mask.cpu()
    b, k = values.shape
    if pairing == "group":  # those with anything to learn
        found = pair_up(values, mask, "best_worst", keep_ties=whole_groups)
    else:
        probabilities = None if scores.probabilities is None else scores.probabilities.cpu()
        found = pair_up(values, mask, pairing, probabilities, keep_ties)
    pairs = torch.stack([found.chosen, found.rejected], dim=1) * b + found.group.unsqueeze(1)
    groups = None
    if pairing == "group":
        groups = (torch.arange(k) * b + found.group.unsqueeze(1)).masked_fill(~mask[found.group], ABSENT)
    return Selection(completions, scores, pairs, groups)


def build_table(
    selections: list[Selection],
    columns: Mapping[str, torch.Tensor],
    max_length: int,
    pad_token_id: int,
    win_rates: bool = False,
) -> tuple[Rows, Plan, list[torch.Tensor]]:
    """
    The table of one selection, or of one with reasoning and one without.

    Args:
        selections (`list[Selection]`):
            What is learnt from.
        columns (`dict[str, torch.Tensor]`):
            Columns of the prompts' dataset, each of shape `(B,)`, one value per prompt of the batch.
        max_length (`int`):
            Tokens of prompt and completion. Prompts lose their beginning, alike for all completions of a prompt.
        pad_token_id (`int`):
            Fills the rows.
        win_rates (`bool`, *optional*, defaults to `False`):
            Whether the scores of a judge, which are win rates, go into the columns beside its probabilities.

    Returns:
        Rows and plan on the CPU, and of each selection the row of each completion, shape `(K B,)`, -1 where it has none. There is
        one row at least, so that all processes take part.
    """
    ids, masks, owners, places = [], [], [], []
    for number, selection in enumerate(selections):
        completions, b = selection.completions, len(selection.completions.prompts)
        members = selection.members
        if (
            completions.vision is not None
        ):  # in some models an image's tensors have no row per completion: all stay, in order
            members = torch.arange(len(completions.ids))
        elif not len(members) and number == len(selections) - 1 and not ids:
            members = torch.zeros(1, dtype=torch.long)
        at = torch.full((len(completions.ids),), ABSENT)
        at[members] = torch.arange(len(members)) + len(ids)
        places.append(at)
        longest: dict[int, int] = {}
        for member in members.tolist():
            longest[member % b] = max(longest.get(member % b, 0), len(completions.ids[member]))
        for member in members.tolist():
            prompt, answer = completions.prompt_ids[member % b], completions.ids[member]
            if completions.vision is None:
                room = max(max_length - longest[member % b], 0)
                prompt, answer = prompt[max(len(prompt) - room, 0) :], answer[:max_length]
            ids.append(torch.cat([prompt, answer]))
            masks.append(torch.cat([torch.zeros_like(prompt), torch.ones_like(answer)]))
            owners.append(number * b + member % b)
    inputs = {
        "input_ids": pad(ids, padding_value=pad_token_id, padding_side="right"),
        "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right"),
        **(selections[0].completions.vision or {}),
    }
    rows = Rows(
        inputs=inputs,
        completion_mask=pad(masks, padding_value=0, padding_side="right"),
        prompt=torch.tensor(owners),
        partner=torch.arange(len(ids)),
    )
    return rows, _plan(selections, places, columns, win_rates), places


def _plan(selections: list[Selection], places: list[torch.Tensor], columns: Mapping, win_rates: bool) -> Plan:
    selection, count = selections[0], len(selections[0].completions.prompts)
    own = [_columns(each, columns, win_rates) for each in selections]
    if len(selections) == 1:
        fields: dict[str, Any] = {"pairs": places[0][selection.pairs]}
        if selection.groups is not None:
            fields["groups"] = torch.where(selection.groups == ABSENT, ABSENT, places[0][selection.groups])
            fields["scores"] = selection.scores_of(selection.groups)
        share = selection.share
        if WEIGHT in columns:
            share = share * columns[WEIGHT][selection.prompts]
        return Plan(**fields, columns=own[0], share=share, count=count)
    # Each prompt's pair with a trace beside its pair without; either may be missing
    prompts = torch.cat([each.prompts for each in selections]).unique()
    where = [torch.searchsorted(prompts, each.prompts) for each in selections]
    pairs, filled = [], []
    for half, (each, place) in enumerate(zip(selections, places, strict=True)):
        absent = torch.full((len(prompts), 2), ABSENT)
        pairs.append(absent.index_put((where[half],), place[each.pairs]))
        # A missing pair has the columns of the other: losses may refuse other values, and nothing comes of them
        filled.append(
            {
                name: values.new_zeros(len(prompts), *values.shape[1:])
                .index_put((where[1 - half],), own[1 - half][name])
                .index_put((where[half],), values)
                for name, values in own[half].items()
            }
        )
    share = columns[WEIGHT][prompts] if WEIGHT in columns else None
    return Plan(pairs[0], pairs[1], columns=filled[0], empty_columns=filled[1], share=share, count=count)


def _columns(selection: Selection, columns: Mapping[str, torch.Tensor], win_rates: bool) -> dict[str, torch.Tensor]:
    """What losses read of each pair or group: the prompts' columns, and what the completions were found to be worth."""
    found = {name: values[selection.prompts] for name, values in columns.items()}
    probabilities = selection.scores.probabilities
    if probabilities is not None and selection.groups is None:
        chosen, rejected = (selection.pairs // len(selection.completions.prompts)).unbind(1)
        found["preference_prob"] = probabilities.cpu()[selection.prompts, chosen, rejected]
    if probabilities is None or win_rates or selection.groups is not None:
        chosen, rejected = selection.rewards_of_pairs().unbind(1)
        found |= {"score_chosen": chosen, "score_rejected": rejected}
    return found
