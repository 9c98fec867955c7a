"""`evaluate.load("path/to/length_bias.py")`; [`trl_ext.metrics.length_bias`] is the function."""

from trl_ext.metrics import length_bias
from trl_ext.metrics.as_module import as_module


LengthBias = as_module(length_bias, optional=["margins"])
