"""`evaluate.load("path/to/preference_accuracy.py")`; [`trl_ext.metrics.preference_accuracy`] is the function."""

from trl_ext.metrics import preference_accuracy
from trl_ext.metrics.as_module import as_module


PreferenceAccuracy = as_module(preference_accuracy)
