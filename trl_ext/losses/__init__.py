"""
Preference losses: pure tensor maths, one file per paper. `README.md` beside this file is the catalogue.

A loss of ours is registered by its own file, which is imported here.
"""

from .aligndistil import AlignDistilLoss
from .alpha_dpo import AlphaDPOLoss
from .anchored import AnchoredLoss
from .asft import ASFTLoss
from .base import Loss
from .batch import GroupBatch, PreferenceBatch, TokenBatch
from .beta_dpo import BetaDPOLoss
from .bias_variance import BiasVarianceLoss
from .cpo import CPOLoss
from .dmpo import DMPOLoss
from .drpo import DRPOLoss
from .eurus import EurusLoss
from .inpo import INPOLoss
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
from .reward_distillation import RewardDistillationLoss
from .robust_em import RobustEMLoss
from .simpo import SimPOLoss
from .sppo_soft import SoftSPPOLoss
from .step_apo import StepAPOLoss
from .trpa import TRPALoss


__all__ = [
    "TRL_LOSS_TYPES",
    "ASFTLoss",
    "AlignDistilLoss",
    "AlphaDPOLoss",
    "AnchoredLoss",
    "BetaDPOLoss",
    "BiasVarianceLoss",
    "CPOLoss",
    "DMPOLoss",
    "DRPOLoss",
    "EurusLoss",
    "GroupBatch",
    "INPOLoss",
    "LengthRegularizedLoss",
    "Loss",
    "MarginAdaptiveLoss",
    "OffsetLoss",
    "PreferenceBatch",
    "RewardDistillationLoss",
    "RobustEMLoss",
    "SimPOLoss",
    "SoftSPPOLoss",
    "StepAPOLoss",
    "TRPALoss",
    "TokenBatch",
    "get_loss",
    "list_aliases",
    "list_losses",
    "loss_class",
    "plugin_errors",
    "register_loss",
    "resolve_name",
]
