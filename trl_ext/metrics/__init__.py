"""
Metrics of preference learning, as plain functions. Each is a module of `evaluate` too, which gathers batches, also over processes:
`evaluate.load(trl_ext.metrics.module_path("win_rate"))`, from the installed package and without a hub. [`MetricsCallback`] measures
them while a trainer runs.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING


_ORIGIN = {
    "calibration_error": "preferences",
    "gradient_variance": "gradients",
    "kl_to_reference": "preferences",
    "length_bias": "length",
    "length_controlled_win_rate": "length",
    "preference_accuracy": "preferences",
    "win_rate": "preferences",
}

# Imported with the trainers that it measures
_CALLBACK = "MetricsCallback"

__all__ = [
    "MetricsCallback",
    "calibration_error",
    "gradient_variance",
    "kl_to_reference",
    "length_bias",
    "length_controlled_win_rate",
    "module_path",
    "preference_accuracy",
    "win_rate",
]

if TYPE_CHECKING:
    from .callback import MetricsCallback
    from .gradients import gradient_variance
    from .length import length_bias, length_controlled_win_rate
    from .preferences import calibration_error, kl_to_reference, preference_accuracy, win_rate


def module_path(name: str) -> str:
    """
    The file that `evaluate.load` takes for a metric of this package.

    Raises:
        `ValueError`: For a name that is none of them.
    """
    if name not in _ORIGIN:
        raise ValueError(f"There is no metric {name!r}; there are {sorted(_ORIGIN)}.")
    return str(Path(__file__).parent / "modules" / f"{name}.py")


def __getattr__(name: str):
    if name == _CALLBACK:
        return getattr(importlib.import_module(".callback", __name__), name)
    if name not in _ORIGIN:
        raise AttributeError(f"module 'trl_ext.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ORIGIN[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
