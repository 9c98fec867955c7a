"""`evaluate.load("path/to/length_controlled_win_rate.py")`; [`trl_ext.metrics.length_controlled_win_rate`] is the function."""

from trl_ext.metrics import length_controlled_win_rate
from trl_ext.metrics.as_module import as_module


LengthControlledWinRate = as_module(length_controlled_win_rate, optional=["instruction_difficulty"])
