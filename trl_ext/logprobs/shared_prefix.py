"""
One row for a prompt and all of its completions.

A pair is usually two rows, `prompt chosen` and `prompt rejected`, and the prompt runs through the model twice. Here it
runs once: a row holds the prompt without its last token, then for each completion that last token and the completion
without *its* last token, which predicts nothing. Each part of the row starts anew at the position after the prompt, and
a mask lets it see the prompt and itself but no other part. Rows that are shorter than the longest are packed together.

    tokens     p0 p1 | p2 c0 c1 | p2 r0 r1 r2        prompt p0 p1 p2, completions c0 c1 c2 and r0 r1 r2 r3
    positions   0  1 |  2  3  4 |  2  3  4  5
    predicts   -  -  | c0 c1 c2 | r0 r1 r2 r3

Masks are stated in positions, so a sliding window of a layer keeps its meaning: transformers builds the mask of each
kind of layer from a function of two indices, which is given the positions of the two tokens instead.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flex_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .substitute import Substitute


# Attention implementations that take a mask
MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")
EXACT_LAYERS = {"attention", "full_attention", "sliding_attention"}


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
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    groups: torch.Tensor
    parts: torch.Tensor
    slots: torch.Tensor

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

            def in_positions(batch, head, query, key):
                visible = mask_function(batch, head, layout.positions[batch, query], layout.positions[batch, key])
                return visible & layout.sees(batch, query, key)

            # A block mask skips what is masked; `_attention_by_mask` takes it to FlexAttention
            on_gpu = name == "sdpa" and layout.tokens.device.type == "cuda"
            kwargs |= {"mask_function": in_positions, "attention_mask": None, "allow_is_causal_skip": False}
            return (flex_attention_mask if on_gpu else build)(*args, **kwargs)

        return masks

    for name in MASKED_ATTENTION:
        ALL_MASK_ATTENTION_FUNCTIONS[name] = interface(name, ALL_MASK_ATTENTION_FUNCTIONS[name])

    def remove() -> None:
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping = local

    return remove


_MASKS = Substitute(_install_masks)


def _attention_by_mask(module, query, key, value, attention_mask, *args, **kwargs):
    """SDPA, or FlexAttention where the mask is a block mask (which SDPA does not take)."""
    dense = attention_mask is None or isinstance(attention_mask, torch.Tensor)
    attend = sdpa_attention_forward if dense else flex_attention_forward
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def enable_block_masks() -> None:
    """Let `sdpa` models take block masks too. Nothing changes for the masks that SDPA knows."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_by_mask


def shared_prefix_layout(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor, groups: int
) -> SharedPrefixLayout | None:
    """
    Args:
        input_ids (`torch.Tensor` of shape `(N, T)`):
            Prompts and completions, padded on the right.
        attention_mask (`torch.Tensor` of shape `(N, T)`):
            1 at tokens.
        completion_mask (`torch.Tensor` of shape `(N, T)`):
            1 at the tokens to score.
        groups (`int`):
            Rows `i`, `i + groups`, `i + 2 groups`, ... may have one prompt. Those whose prompts differ (truncation can
            do that) do not share it.

    Returns:
        [`SharedPrefixLayout`], or `None` for a batch that is not padded on the right or has no tokens.
    """
    (rows, width), device = input_ids.shape, input_ids.device
    members = rows // groups
    columns = torch.arange(width, device=device)
    lengths = attention_mask.sum(dim=1)
    scored = completion_mask.bool()
    prompts = torch.where(scored.any(dim=1), scored.int().argmax(dim=1), lengths)
    prefixes = (prompts - 1).clamp(min=0)
    right_padded = (attention_mask.bool() == (columns < lengths.unsqueeze(1))).all()
    # same[i, j]: whether member i of a group has the prefix of member j
    ids, starts = input_ids.view(members, groups, width), prefixes.view(members, groups)
    same = torch.stack(
        [
            (starts == starts[j]) & ((ids == ids[j]) | (columns >= starts[j].unsqueeze(1))).all(dim=2)
            for j in range(members)
        ],
        dim=1,
    )
    # One transfer: what follows is bookkeeping on a few numbers per row
    facts = torch.cat([right_padded.view(1), lengths, prefixes, same.flatten()]).cpu().numpy().astype(np.int64)
    lengths, prefixes, same = np.split(facts[1:], [rows, 2 * rows])
    same = same.reshape(members, members, groups).astype(bool)
    if not facts[0] or not lengths.any():
        return None

    units = []  # (rows that share a prompt, slots they need)
    for group in range(groups):
        left = list(range(members))
        while left:
            shared = [member for member in left if same[member, left[0], group]]
            left = [member for member in left if member not in shared]
            unit = [member * groups + group for member in shared]
            parts = sum(max(lengths[row] - 1 - prefixes[row], 0) for row in unit)
            units.append((unit, int(prefixes[unit[0]] + parts)))
    length = max(1, max(size for _, size in units))
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
    owner = 0
    for place, packed in enumerate(bins):
        end = 0
        for unit in packed:
            prefix = int(prefixes[unit[0]])
            pieces = [(unit[0], 0, prefix, 0)]
            pieces += [(row, prefix, max(int(lengths[row]) - 1, prefix), k) for k, row in enumerate(unit, start=1)]
            for row, first, last, part in pieces:
                here = slice(end, end + last - first)
                positions[place, here] = np.arange(first, last)
                tokens[place, here] = row * width + positions[place, here]
                parts[place, here] = part
                owners[place, here] = owner
                if part:
                    slots[row, first:last] = place * length + np.arange(here.start, here.stop)
                end = here.stop
            owner += 1
    arrays = (tokens, positions, owners, parts, slots)
    return SharedPrefixLayout(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


def pays(layout: SharedPrefixLayout, rows: int, width: int, hidden_size: int) -> bool:
    """
    Whether the shared rows cost less than the plain ones.

    A token of a layer costs about `24 H^2` operations in products with weights and, under a dense mask, `4 H L` in
    attention: up to a factor, `6 H + L`.
    """
    shared_rows, length = layout.tokens.shape
    return shared_rows * length * (6 * hidden_size + length) < rows * width * (6 * hidden_size + width)


def why_not_shared(model: PreTrainedModel) -> str | None:
    """What makes a shared prompt inexact (or impossible) for a model; `None` if nothing does."""
    config = model.config.get_text_config()
    backbone = model.base_model
    arguments = inspect.signature(type(backbone).forward).parameters
    if config is not model.config:
        return "it is multimodal"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if config._attn_implementation not in MASKED_ATTENTION:
        return f"`attn_implementation={config._attn_implementation!r}` takes no mask (use one of {MASKED_ATTENTION})"
    layers = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    if layers - EXACT_LAYERS:
        return f"it has layers of type {sorted(layers - EXACT_LAYERS)}"
    if getattr(model, "_is_stateful", False) or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "it has recurrent or convolutional layers"
    if getattr(config, "attention_chunk_size", None):
        return "it attends in chunks"
    if getattr(config, "use_bidirectional_attention", False):
        return "it attends in both directions"
    if "position_ids" not in arguments or getattr(config, "alibi", False):
        return "it takes no position ids"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "mrope_section" in rope:
        return "it has multimodal rotary positions"
    if not hasattr(sys.modules[type(backbone).__module__], "create_causal_mask"):
        return "it does not build its attention masks through transformers"
    dropout = max(
        (
            getattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
            for module in model.modules()
            if isinstance(module, nn.Dropout) or isinstance(getattr(module, "attention_dropout", None), float)
        ),
        default=0.0,
    )
    if dropout > 0:
        return "dropout is on"
    return None
