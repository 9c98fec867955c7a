"""From a user's columns to a batch: which columns are read, whether they can be used, and the empty-trace pair."""

from .collator import PreferenceCollator
from .load import load_preferences
from .reasoning import EMPTY_TRACE, strip_reasoning_traces


__all__ = ["EMPTY_TRACE", "PreferenceCollator", "load_preferences", "strip_reasoning_traces"]
