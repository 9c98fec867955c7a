"""Preference losses: pure tensor maths, one file per paper. `README.md` beside this file is the catalogue."""

from .anchored import AnchoredLoss
from .base import Loss
from .batch import GroupBatch, PreferenceBatch
from .bias_variance import BiasVarianceLoss
from .length_regularized import LengthRegularizedLoss
from .margin_adaptive import MarginAdaptiveLoss
from .offset import OffsetLoss
from .registry import (
    TRL_LOSS_TYPES,
    get_loss,
    list_aliases,
    list_losses,
    loss_class,
    plugin_errors,
    register_loss,
    resolve_name,
)


__all__ = [
    "TRL_LOSS_TYPES",
    "AnchoredLoss",
    "BiasVarianceLoss",
    "GroupBatch",
    "LengthRegularizedLoss",
    "Loss",
    "MarginAdaptiveLoss",
    "OffsetLoss",
    "PreferenceBatch",
    "get_loss",
    "list_aliases",
    "list_losses",
    "loss_class",
    "plugin_errors",
    "register_loss",
    "resolve_name",
]
