"""`evaluate.load("path/to/gradient_variance.py")`; [`trl_ext.metrics.gradient_variance`] is the function."""

from trl_ext.metrics import gradient_variance
from trl_ext.metrics.as_module import as_module


GradientVariance = as_module(gradient_variance, lists=True)
