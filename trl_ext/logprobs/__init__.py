"""
Token log-probabilities and their sums, the hot path. Knows nothing of losses.

- `head.py`: from hidden states to log-probabilities; `torch_head.py` and `liger_head.py` compute its tiles
- `shared_prefix.py`: one row for a prompt and all of its completions
- `sequence.py`: from tokens to completions
"""

from .head import DEFAULT_MEMORY_MB, Head, TokenLogProbs, Transform
from .sequence import completion_lengths, sum_completions
from .shared_prefix import SharedPrefixLayout, pays, shared_prefix_layout, why_not_shared


__all__ = [
    "DEFAULT_MEMORY_MB",
    "Head",
    "SharedPrefixLayout",
    "TokenLogProbs",
    "Transform",
    "completion_lengths",
    "pays",
    "shared_prefix_layout",
    "sum_completions",
    "why_not_shared",
]
