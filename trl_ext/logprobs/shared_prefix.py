"""
One row for a prompt and all of its completions.

A pair is usually two rows, `prompt chosen` and `prompt rejected`, and the prompt runs through the model twice. Here it
runs once: a row holds the prompt without its last token, then for each completion that last token and the completion
without *its* last token, which predicts nothing. Each part of the row starts anew at the position after the prompt, and
no part sees another. Rows that are shorter than the longest are packed together.

    tokens     p0 p1 | p2 c0 c1 | p2 r0 r1 r2        prompt p0 p1 p2, completions c0 c1 c2 and r0 r1 r2 r3
    positions   0  1 |  2  3  4 |  2  3  4  5
    predicts   -  -  | c0 c1 c2 | r0 r1 r2 r3

Either all of them lie in one row without padding, and attention takes each part as a sequence of its own (`varlen.py`); or a
mask says what a token may see. Masks are stated in positions, so a sliding window of a layer keeps its meaning: transformers
builds the mask of each kind of layer from a function of two indices, which is given the positions of the two tokens instead.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .substitute import Substitute
from .varlen import FLASH_ATTENTION, SequenceMask, Sequences


# Attention implementations that take a mask
MASKED_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class SharedPrefixLayout:
    """
    Where each token of a plain batch of `N` rows of `T` tokens lies in `R` shared rows of `L` slots.

    Attributes:
        tokens (`torch.Tensor` of shape `(R, L)`):
            Index of the slot's token in the flattened plain batch; 0 in padding.
        positions (`torch.Tensor` of shape `(R, L)`):
            Position of the token in its plain row; 0 in padding.
        groups (`torch.Tensor` of shape `(R, L)`):
            Number of the prompt, -1 in padding.
        parts (`torch.Tensor` of shape `(R, L)`):
            0 in the prompt, k in its k-th completion.
        slots (`torch.Tensor` of shape `(N, T - 1)`):
            Index, in the flattened shared batch, of the slot that predicts each next token; 0 where none does.
        scored (`torch.Tensor` of shape `(M,)`):
            Index, in the flattened `(N, T - 1)`, of each next token that is scored.
        sequences ([`Sequences`], *optional*):
            What attention is given in place of a mask, where all tokens lie in one row without padding.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    groups: torch.Tensor
    parts: torch.Tensor
    slots: torch.Tensor
    scored: torch.Tensor
    sequences: Sequences | None = None

    def sees(self, batch, query, key):
        """Whether the token in one slot of a row may attend to another, the order of positions aside."""
        groups, parts = self.groups, self.parts
        part = parts[batch, key]
        return (groups[batch, query] == groups[batch, key]) & ((part == 0) | (part == parts[batch, query]))

    @contextlib.contextmanager
    def masks(self) -> Iterator[None]:
        """
        While open, attention masks that transformers builds are those of this layout.

        Raises:
            `RuntimeError`: If none was built: the model then attends in a way that this layout cannot mask.
        """
        built: list[str] = []
        with _MASKS.acting((self, built)):
            yield
        if not built:
            raise RuntimeError(
                "The model built no attention mask through transformers, so a prompt cannot be shared by its "
                "completions. Set `share_prefix=False`."
            )


def _install_masks(current: ContextVar) -> Callable[[], None]:
    """Have transformers build the masks of the layout that the running thread has, where it has one."""
    local = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)

    def interface(name: str, build: Callable) -> Callable:
        def masks(*args, mask_function, **kwargs):
            if current.get() is None:
                return build(*args, mask_function=mask_function, **kwargs)
            layout, built = current.get()
            built.append(name)

            if layout.sequences is not None:
                if kwargs.get("use_vmap"):
                    raise RuntimeError("a layer attends by a mask of its own")
                return SequenceMask(layout.sequences, kwargs.get("local_size"))

            def in_positions(batch, head, query, key):
                visible = mask_function(batch, head, layout.positions[batch, query], layout.positions[batch, key])
                return visible & layout.sees(batch, query, key)

            kwargs |= {"mask_function": in_positions, "attention_mask": None, "allow_is_causal_skip": False}
            return build(*args, **kwargs)

        return masks

    for name in (*MASKED_ATTENTION, *FLASH_ATTENTION):
        ALL_MASK_ATTENTION_FUNCTIONS[name] = interface(name, ALL_MASK_ATTENTION_FUNCTIONS[name])

    def remove() -> None:
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping = local

    return remove


_MASKS = Substitute(_install_masks)


def shared_prefix_layout(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    prompt: torch.Tensor,
    unpadded: bool = False,
) -> SharedPrefixLayout | None:
    """
    Bookkeeping on the host, for tensors that are on the CPU still; those of a device are fetched first.

    Args:
        input_ids (`torch.Tensor` of shape `(N, T)`):
            Prompts and completions, padded on the right.
        attention_mask (`torch.Tensor` of shape `(N, T)`):
            1 at tokens.
        completion_mask (`torch.Tensor` of shape `(N, T)`):
            1 at the tokens to score.
        prompt (`torch.Tensor` of shape `(N,)`):
            Which prompt a row continues. Rows of one prompt share it, unless their tokens before the completion differ
            (truncation can do that).
        unpadded (`bool`, *optional*, defaults to `False`):
            Whether all tokens go into one row, with the sequences that attention takes.

    Returns:
        [`SharedPrefixLayout`] on the device of the batch, or `None` for a batch that is not padded on the right or has no tokens.
    """
    ids, attended, scored = (tensor.cpu().numpy() for tensor in (input_ids, attention_mask, completion_mask != 0))
    rows, width = ids.shape
    lengths = attended.sum(axis=1)
    if not lengths.any() or ((attended != 0) != (np.arange(width) < lengths[:, None])).any():
        return None
    prefixes = np.maximum(np.where(scored.any(axis=1), scored.argmax(axis=1), lengths) - 1, 0)

    sharing: dict[tuple[int, bytes], list[int]] = {}  # rows by prompt and by the tokens of it that they have
    for row, number in enumerate(prompt.tolist()):
        sharing.setdefault((number, ids[row, : prefixes[row]].tobytes()), []).append(row)
    units = []  # (rows that share a prompt, slots they need)
    for unit in sharing.values():
        parts = sum(max(lengths[row] - 1 - prefixes[row], 0) for row in unit)
        units.append((unit, int(prefixes[unit[0]] + parts)))
    length = max(1, (sum if unpadded else max)(size for _, size in units))
    bins: list[list] = []  # first fit, longest first
    room: list[int] = []
    for unit, size in sorted(units, key=lambda item: -item[1]):
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(length)
        bins[place].append(unit)
        room[place] -= size

    tokens, positions, parts = (np.zeros((len(bins), length), dtype=np.int64) for _ in range(3))
    owners = np.full((len(bins), length), -1, dtype=np.int64)
    slots = np.zeros((rows, max(width - 1, 0)), dtype=np.int64)
    keys: list[np.ndarray] = []  # of each sequence
    queries: list[int] = []
    owner = 0
    for place, packed in enumerate(bins):
        end = 0
        for unit in packed:
            start, prefix = end, int(prefixes[unit[0]])
            pieces = [(unit[0], 0, prefix, 0)]
            pieces += [(row, prefix, max(int(lengths[row]) - 1, prefix), k) for k, row in enumerate(unit, start=1)]
            for row, first, last, part in pieces:
                here = slice(end, end + last - first)
                positions[place, here] = np.arange(first, last)
                tokens[place, here] = row * width + positions[place, here]
                parts[place, here] = part
                owners[place, here] = owner
                end = here.stop
                if part:
                    slots[row, first:last] = place * length + np.arange(here.start, here.stop)
                    # The prompt's own tokens are asked for in the sequence of its first completion
                    asking = int(last if part == 1 else last - first)
                    if asking:
                        queries.append(asking)
                        keys.append(np.r_[start : start + prefix, here])
            owner += 1
    arrays = (tokens, positions, owners, parts, slots, np.flatnonzero(scored[:, 1:]))
    layout = (torch.from_numpy(array).to(input_ids.device) for array in arrays)
    return SharedPrefixLayout(*layout, _sequences(keys, queries, input_ids.device) if unpadded else None)


def _sequences(keys: list[np.ndarray], queries: list[int], device: torch.device) -> Sequences:
    """Of the slots that each sequence sees and of how many slots ask; where there is none, of the one slot that is left."""
    keys, queries = keys or [np.zeros(1, dtype=np.int64)], queries or [1]
    lengths = [len(each) for each in keys]
    ends = (np.cumsum([0, *each], dtype=np.int32) for each in (queries, lengths))
    arrays = (np.concatenate(keys), *ends)
    return Sequences(*(torch.from_numpy(array).to(device) for array in arrays), queries, lengths)
