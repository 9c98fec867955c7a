"""`evaluate.load("path/to/kl_to_reference.py")`; [`trl_ext.metrics.kl_to_reference`] is the function."""

from trl_ext.metrics import kl_to_reference
from trl_ext.metrics.as_module import as_module


KlToReference = as_module(kl_to_reference, optional=["lengths"])
