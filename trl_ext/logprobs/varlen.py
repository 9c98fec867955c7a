"""
Attention over sequences of any length that lie in one unpadded row.

Every completion is a sequence of its own: the queries are its tokens, the keys are those of its prompt and its own. Keys and
values of a prompt are gathered once per completion, in each layer; all else of the layer sees each token once. There is no
mask: what a query may see follows from its place in the sequence, as in FlashAttention's functions for sequences of varying
length, where fewer queries than keys stand at the end. Places in a sequence are positions of the plain row, so a sliding window
means what it means there.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# Implementations that transformers itself calls FlashAttention's functions for
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3")
HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


@dataclass(frozen=True)
class Sequences:
    """
    `S` sequences whose queries are the `L` slots of a row, in order.

    Attributes:
        keys (`torch.Tensor` of shape `(K,)`):
            Slots whose keys and values the sequences see, one sequence after the other.
        query_ends (`torch.Tensor` of shape `(S + 1,)`):
            Where each sequence's queries begin, and where the last ones end; int32.
        key_ends (`torch.Tensor` of shape `(S + 1,)`):
            The same of keys.
        query_lengths (`list[int]`):
            Queries of each sequence, for the host.
        key_lengths (`list[int]`):
            Keys of each sequence.
    """

    keys: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    query_lengths: list[int]
    key_lengths: list[int]


@dataclass(frozen=True)
class SequenceMask:
    """
    What a layer is given in place of a mask. A layer that gradient checkpointing runs again is given it again.

    Attributes:
        sequences ([`Sequences`]):
            Of the batch.
        window (`int`, *optional*):
            Keys that a query sees at most, itself included; all before it by default.
        added (`dict[tuple, torch.Tensor]`):
            What [`hidden`] has made so far.
    """

    sequences: Sequences
    window: int | None = None
    added: dict[tuple, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def hidden(self, queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
        """
        What is added to the products of a sequence, `(queries, keys)`: -inf where a query does not see a key.

        Kept for the other layers. SDPA on a CPU would make it of booleans in each call.
        """
        key = (queries, keys, like.dtype, like.device)
        if key not in self.added:
            places = torch.arange(keys, device=like.device)
            behind = places[keys - queries :].unsqueeze(1) - places
            unseen = (behind < 0) if self.window is None else (behind < 0) | (behind >= self.window)
            zeros = torch.zeros(queries, keys, dtype=like.dtype, device=like.device)
            self.added[key] = zeros.masked_fill(unseen, -torch.inf)
        return self.added[key]


@functools.cache
def _options(function: Callable | None) -> frozenset[str]:
    """Names of the arguments; looked up once, as every layer asks."""
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


def has_kernel() -> bool:
    """Whether torch's function for sequences takes windows and scales, as from torch 2.11 on."""
    return {"scale", "window_size"} <= _options(varlen_attn)


def serve_sequences(implementation: str) -> None:
    """
    Have transformers' attention function of this name take a [`SequenceMask`] too.

    Nothing changes for every other mask, and for models that are given none.
    """
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    if getattr(function, "takes_sequences", False):
        return
    wrapped = _through_flash_attention(function) if implementation in FLASH_ATTENTION else _through_torch(function)
    wrapped.takes_sequences = True
    AttentionInterface.register(implementation, wrapped)


def _through_torch(function: Callable) -> Callable:
    @functools.wraps(function)
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        if not isinstance(attention_mask, SequenceMask):
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        device = query.device.type
        # As for SDPA itself: norms of queries and keys may have left float32 behind
        if torch.is_autocast_enabled(device):
            query, key, value = (each.to(torch.get_autocast_dtype(device)) for each in (query, key, value))
        query, key, value = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
        output = attend(query, key, value, attention_mask, kwargs.get("scaling"))
        return output.unsqueeze(0), None

    return attention


def _through_flash_attention(function: Callable) -> Callable:
    @functools.wraps(function)
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        if not isinstance(attention_mask, SequenceMask):
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        sequences = attention_mask.sequences
        key, value = (each.index_select(2, sequences.keys) for each in (key, value))
        kwargs |= {
            "cu_seq_lens_q": sequences.query_ends,
            "cu_seq_lens_k": sequences.key_ends,
            "max_length_q": max(sequences.query_lengths),
            "max_length_k": max(sequences.key_lengths),
        }
        return function(module, query, key, value, None, *args, **kwargs)

    return attention


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SequenceMask, scale: float | None = None
) -> torch.Tensor:
    """
    Attention of each sequence.

    Args:
        query (`torch.Tensor` of shape `(L, A, D)`):
            Of `A` heads.
        key (`torch.Tensor` of shape `(L, B, D)`):
            Of `B` heads, each of which serves `A / B` heads of the queries.
        value (`torch.Tensor` of shape `(L, B, D')`):
            As the keys.
        mask ([`SequenceMask`]):
            Which keys each query sees.
        scale (`float`, *optional*):
            Factor of the products of queries and keys; one over the root of `D` by default.

    Returns:
        `torch.Tensor` of shape `(L, A, D')`.
    """
    sequences = mask.sequences
    key, value = (each.index_select(0, sequences.keys) for each in (key, value))
    if not _kernel_takes(query, value):
        return _one_by_one(query, key, value, mask, scale)
    # torch 2.11 has no such argument, and does not ask for it where several heads of queries share one of keys
    options = {"enable_gqa": True} if "enable_gqa" in _options(varlen_attn) else {}
    return varlen_attn(
        query,
        key,
        value,
        sequences.query_ends,
        sequences.key_ends,
        max(sequences.query_lengths),
        max(sequences.key_lengths),
        scale=scale,
        window_size=(-1 if mask.window is None else mask.window - 1, 0),
        **options,
    )


def _kernel_takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    size = query.size(-1)
    return (
        has_kernel()
        and query.is_cuda
        and query.dtype in HALF
        and size == value.size(-1)
        and size % 8 == 0
        and size <= LARGEST_HEAD
    )


def _one_by_one(query, key, value, mask, scale):
    """What the kernel computes, for every device and dtype."""
    sequences, outputs = mask.sequences, []
    lengths = sequences.query_lengths, sequences.key_lengths
    parts = (query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]))
    for queries, keys, *each in zip(*lengths, *parts, strict=True):
        whole = queries == keys and (mask.window is None or queries <= mask.window)
        output = scaled_dot_product_attention(
            *(part.transpose(0, 1).unsqueeze(0) for part in each),
            attn_mask=None if whole else mask.hidden(queries, keys, query),
            is_causal=whole,
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        outputs.append(output.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)
