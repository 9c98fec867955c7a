"""Token log-probabilities and their sums. Knows nothing of losses."""

from .sequence import completion_lengths, sum_completions


__all__ = ["completion_lengths", "sum_completions"]
