"""Sampling completions: a key-value cache, one prefill per prompt, and the geometric mixture of two models."""

from .completions import Completions
from .decoding import DrawToken
from .mixture import GeometricMixture
from .modes import evaluating, without_defaults
from .prefill import last_logits
from .sampling import sample, sample_rows


__all__ = [
    "Completions",
    "DrawToken",
    "GeometricMixture",
    "evaluating",
    "last_logits",
    "sample",
    "sample_rows",
    "without_defaults",
]
