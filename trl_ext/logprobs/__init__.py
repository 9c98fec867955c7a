"""
Token log-probabilities and their sums, the hot path. Knows nothing of losses.

- `head.py`: from hidden states to log-probabilities; `torch_head.py` and `liger_head.py` compute its tiles (`memory.py`:
  how large they are; `products.py`: matrix products; `statistics_kernel.py`: what Liger's kernel does not know)
- `divergence.py`: a number for each token from the logits of several models, in the head's tiles
- `shared_prefix.py`: one row for a prompt and all of its completions, by masks or, through `varlen.py`, without; `sharing.py` decides
  where that is exact and pays
- `sequence.py`: from tokens to completions
"""

from .divergence import Divergence, Projection, projection
from .head import DEFAULT_MEMORY_MB, Head, TokenLogProbs, Transform
from .sequence import completion_lengths, scored_tokens, sum_completions
from .shared_prefix import SharedPrefixLayout, shared_prefix_layout
from .sharing import Sharing, pays, takes_masks, why_not_shared, why_not_unpadded
from .varlen import Sequences


__all__ = [
    "DEFAULT_MEMORY_MB",
    "Divergence",
    "Head",
    "Projection",
    "Sequences",
    "SharedPrefixLayout",
    "Sharing",
    "TokenLogProbs",
    "Transform",
    "completion_lengths",
    "pays",
    "projection",
    "scored_tokens",
    "shared_prefix_layout",
    "sum_completions",
    "takes_masks",
    "why_not_shared",
    "why_not_unpadded",
]
