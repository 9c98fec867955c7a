"""
Iterative preference optimisation: in each round the current policy writes, rewards or a judge score, completions become
pairs, and the policy learns from them.

`config.py` says what a run is, `settings.py` reads it from YAML, `iterate.py` has the rounds and their stages, `disk.py` remembers what is done. Beside them:
`checks.py` (settings that cannot be used), `rewards.py` (what scores), `log_probs.py` (implicit rewards), `shaping.py` (from
scored completions to pairs), `replay.py` (older pairs among the new ones), `extrapolate.py` (weights between rounds) and
`report.py` (metrics).
"""

import importlib
from typing import TYPE_CHECKING


_ORIGIN = {"IterativeDPO": "iterate", "RoundsConfig": "config"}

__all__ = ["IterativeDPO", "RoundsConfig"]

if TYPE_CHECKING:
    from .config import RoundsConfig
    from .iterate import IterativeDPO


def __getattr__(name: str):
    if name not in _ORIGIN:
        raise AttributeError(f"module 'trl_ext.rounds' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ORIGIN[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
