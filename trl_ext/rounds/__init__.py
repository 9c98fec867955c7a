"""
Iterative preference optimisation: in each round the current policy writes, a judge scores, completions become pairs, and the
policy learns from them.

`config.py` says what a run is, `stages.py` has the four stages, `iterate.py` runs them and remembers what is done.
"""

from .config import RoundsConfig
from .iterate import IterativeDPO


__all__ = ["IterativeDPO", "RoundsConfig"]
