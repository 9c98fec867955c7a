"""`evaluate.load("path/to/win_rate.py")`; [`trl_ext.metrics.win_rate`] is the function."""

from trl_ext.metrics import win_rate
from trl_ext.metrics.as_module import as_module


WinRate = as_module(win_rate, optional=["swapped_preferences"])
