"""From examples to the table of rows, whatever collator pads them. Runs in the data loader's workers."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.data.checks import REFERENCES, TOKENIZED
from trl_ext.data.columns import WEIGHT
from trl_ext.data.further import FURTHER
from trl_ext.data.groups import BEHAVIOUR_LOGPS, GROUP_SCORES
from trl_ext.data.turns import NOT_SCORED, TURNS
from trl_ext.logprobs import Sharing, completion_lengths
from trl_ext.rows import ABSENT, Plan, Rows, to_batch


KEY_BYTES = 16


@dataclass
class RowsCollator:
    """
    Wraps a collator of pairs: all completions of the examples go through it at once, so that they are padded once.

    Its batch becomes [`~trl_ext.rows.Rows`], TRL's pairs first, with a [`~trl_ext.rows.Plan`] of what is learnt from them.

    Args:
        collator (`Callable`):
            TRL's collator or the user's own. Of `E` pairs it makes rows of the `E` chosen completions, then of the rejected ones.
        columns (`Sequence[str]`, *optional*):
            Numeric columns: each becomes a float32 tensor of shape `(B,)`, or `(B, M)` where rows hold lists of `M` numbers.
        empty_trace (`bool`, *optional*, defaults to `False`):
            Whether an example's further pair, where it has one, is that with an empty trace.
        groups (`bool`, *optional*, defaults to `False`):
            Whether examples are groups, and their further pairs the other completions.
        sharing ([`~trl_ext.logprobs.Sharing`], *optional*):
            Lays out the batch in shared rows.
        turns (`bool`, *optional*, defaults to `False`):
            Whether the columns `chosen_turns` and `rejected_turns`, where examples have them, say what is scored.
        keys (`bool`, *optional*, defaults to `False`):
            Whether rows are given keys, by which what is known of them is found again.
        ld_alpha (`float`, *optional*):
            Of LD-DPO: what is known of a row depends on the length of its partner too.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    columns: Sequence[str] = ()
    empty_trace: bool = False
    groups: bool = False
    sharing: Sharing | None = None
    turns: bool = False
    keys: bool = False
    ld_alpha: float | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        count = len(examples)
        # Read first: TRL's vision collator changes the examples
        columns = {name: torch.stack([_numbers(example[name]) for example in examples]) for name in self.columns}
        further = [(number, pair) for number, example in enumerate(examples) for pair in example.get(FURTHER) or ()]
        lists = {
            name: [example[name] for example in examples]
            for name in (GROUP_SCORES, BEHAVIOUR_LOGPS)
            if self.groups and name in examples[0]
        }

        pairs = [*examples, *(pair for _, pair in further)] if further else examples
        batch = dict(self.collator(pairs))
        turns = None
        if self.turns and TURNS[0] in examples[0]:
            turns = self._turns(pairs, batch["completion_mask"])
            batch["completion_mask"] = batch["completion_mask"] * (turns != NOT_SCORED)
        total = count + len(further)
        # Rows of the pairs, `(E, 2)`, as the collator has them: chosen completions first
        places = torch.arange(2 * total).view(2, total).T
        there = torch.ones(total, 2, dtype=torch.bool)
        for place, (_, pair) in enumerate(further, start=count):
            there[place, 1] = bool(pair["rejected_ids"]) or not self.groups  # the last of an odd number stands alone
        order = torch.cat([places[:count].T.flatten(), places[count:][there[count:]]])
        at = torch.full((2 * total,), ABSENT).index_put((order,), torch.arange(len(order)))[places]

        ref = [batch.pop(name) for name in REFERENCES if name in batch]
        if further:
            batch = {name: _rows(name, value, 2 * total)[order] for name, value in batch.items()}
            turns = None if turns is None else turns[order]
        owner = torch.tensor([*range(count), *(number for number, _ in further)]).repeat(2)[order]
        partner = torch.arange(len(order)).index_put((at[there[:, 1]],), at[there[:, 1]].flip(1))

        plan: dict[str, Any] = {}
        behaviour = None
        if self.empty_trace:
            of_empty_trace = {number: at[place] for place, (number, _) in enumerate(further, start=count)}
            absent = torch.full((2,), ABSENT)
            plan["empty_pairs"] = torch.stack([of_empty_trace.get(number, absent) for number in range(count)])
        if self.groups:
            of = [torch.nonzero(owner == number).flatten() for number in range(count)]
            pad = torch.nn.utils.rnn.pad_sequence
            plan["groups"] = pad(of, batch_first=True, padding_value=ABSENT)
            plan["scores"] = pad([torch.tensor(scores, dtype=torch.float32) for scores in lists[GROUP_SCORES]], True)
            if BEHAVIOUR_LOGPS in lists:
                values = [float(value) for logps in lists[BEHAVIOUR_LOGPS] for value in logps]
                behaviour = torch.zeros(len(order)).index_put((torch.cat(of),), torch.tensor(values))
        mask = batch.pop("completion_mask")
        rows = Rows(
            inputs=batch,
            completion_mask=mask,
            prompt=owner,
            partner=partner,
            layout=None if self.sharing is None else self.sharing.layout(batch, mask, owner),
            ref_logps=torch.cat(ref)[order] if ref else None,
            behaviour_logps=behaviour,
            turns=turns,
            keys=content_keys(batch, mask, None if self.ld_alpha is None else partner) if self.keys else None,
        )
        return to_batch(rows, Plan(pairs=at[:count], columns=columns, share=columns.get(WEIGHT), **plan))

    def _turns(self, pairs: list[dict[str, Any]], mask: torch.Tensor) -> torch.Tensor:
        """Turns of the tokens of all rows, shape `(N, T)`."""
        # In the place of token ids, so that the collator cuts and pads them as it does these
        numbered = []
        for pair in pairs:
            numbers = {}
            for ids, name in zip(TOKENIZED[1:], TURNS, strict=True):
                count = len(pair[ids])  # 0 where preparation emptied a completion that is not there
                numbers[ids] = (pair.get(name) or [0] * count)[:count]
            numbered.append({**pair, **numbers})
        turns = torch.where(mask != 0, self.collator(numbered)["input_ids"], NOT_SCORED)
        there = turns != NOT_SCORED
        # Where truncation left nothing of the first turns, the next one is the first. A row's first token is never scored
        first = torch.where(there, turns, turns.max() + 1)[:, 1:].amin(dim=1, keepdim=True)
        return torch.where(there, (turns - first).clamp(min=0), NOT_SCORED)


def content_keys(
    inputs: Mapping[str, torch.Tensor], completion_mask: torch.Tensor, partner: torch.Tensor | None = None
) -> list[bytes] | None:
    """
    A key of each row: its tokens without padding, which of them are scored, and how long its `partner` is, where one is given.

    `None` where the batch holds what such a key leaves out: inputs beside tokens, such as images, or padding in front, by which
    positions differ from batch to batch.
    """
    if set(inputs) != {"input_ids", "attention_mask"}:
        return None
    attended = inputs["attention_mask"] != 0
    if (attended[:, 1:] & ~attended[:, :-1]).any():
        return None
    ids, scored = inputs["input_ids"].long().cpu().numpy(), (completion_mask != 0).cpu().numpy()
    beside = [-1] * len(ids) if partner is None else completion_lengths(completion_mask)[partner].tolist()
    keys = []
    for row, (end, length) in enumerate(zip(attended.sum(dim=1).tolist(), beside, strict=True)):
        content = ids[row, :end].tobytes() + scored[row, :end].tobytes() + length.to_bytes(8, "little", signed=True)
        keys.append(hashlib.blake2b(content, digest_size=KEY_BYTES).digest())
    return keys


def _numbers(value: Any) -> torch.Tensor:
    """A number or a list of them, in whatever format the dataset gives it, in float32."""
    return torch.as_tensor(float(value) if isinstance(value, str) else value, dtype=torch.float32)


def _rows(name: str, value: Any, count: int) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != count:
        raise ValueError(
            f"The collator gives {name!r}, which has no row for each of the {count} completions, so that those of an empty-trace "
            "pair or of a group cannot be told apart. Leave it out, or train on pairs alone."
        )
    return value
