"""`evaluate.load("path/to/calibration_error.py")`; [`trl_ext.metrics.calibration_error`] is the function."""

from trl_ext.metrics import calibration_error
from trl_ext.metrics.as_module import as_module


CalibrationError = as_module(calibration_error)
