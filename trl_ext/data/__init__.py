"""
From a user's data to a batch: columns, groups and pairs, scores and their calibration, sampling, reasoning traces, recipes, and
adapters for data that many use (`trl_ext.data.adapters`).
"""

import importlib
from typing import TYPE_CHECKING


_ORIGIN = {
    "EMPTY_TRACE": "reasoning",
    "Ensemble": "rewards",
    "JudgeFunction": "rewards",
    "PreferenceModel": "preference_model",
    "RowsCollator": "collator",
    "RewardFunction": "rewards",
    "RewardModel": "rewards",
    "TextOverlap": "overlap",
    "calibrate": "calibration",
    "fit_temperature": "calibration",
    "from_groups": "groups",
    "inspect_preferences": "inspection",
    "load_preferences": "load",
    "pair_traces": "sampling",
    "preference_score": "preference_model",
    "sample_completions": "sampling",
    "score_preferences": "scores",
    "strip_reasoning_traces": "reasoning",
}

__all__ = [
    "EMPTY_TRACE",
    "Ensemble",
    "JudgeFunction",
    "PreferenceModel",
    "RewardFunction",
    "RewardModel",
    "RowsCollator",
    "TextOverlap",
    "calibrate",
    "fit_temperature",
    "from_groups",
    "inspect_preferences",
    "load_preferences",
    "pair_traces",
    "preference_score",
    "sample_completions",
    "score_preferences",
    "strip_reasoning_traces",
]

if TYPE_CHECKING:
    from .calibration import calibrate, fit_temperature
    from .collator import RowsCollator
    from .groups import from_groups
    from .inspection import inspect_preferences
    from .load import load_preferences
    from .overlap import TextOverlap
    from .preference_model import PreferenceModel, preference_score
    from .reasoning import EMPTY_TRACE, strip_reasoning_traces
    from .rewards import Ensemble, JudgeFunction, RewardFunction, RewardModel
    from .sampling import pair_traces, sample_completions
    from .scores import score_preferences


def __getattr__(name: str):
    if name not in _ORIGIN:
        raise AttributeError(f"module 'trl_ext.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ORIGIN[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
