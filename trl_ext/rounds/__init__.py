"""
Iterative preference optimisation: in each round the current policy writes, rewards or a judge score, completions become
pairs, and the policy learns from them.

`config.py` says what a run is, `iterate.py` has the rounds and their stages, `disk.py` remembers what is done. Beside them:
`checks.py` (settings that cannot be used), `rewards.py` (what scores), `log_probs.py` (implicit rewards), `shaping.py` (from
scored completions to pairs), `replay.py` (older pairs among the new ones), `extrapolate.py` (weights between rounds) and
`report.py` (metrics).
"""

from .config import RoundsConfig
from .iterate import IterativeDPO


__all__ = ["IterativeDPO", "RoundsConfig"]
