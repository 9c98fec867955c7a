"""Preference losses that TRL lacks, as `loss_type=` of its own trainers.

Names are loaded on first use, so `import trl_ext` costs what `import trl` costs and touches no device.
"""

import importlib
from typing import TYPE_CHECKING

from trl_ext.version import __version__


_ORIGIN = {
    "Completions": "trl_ext.generation",
    "DPOConfig": "trl_ext.trainers.dpo_config",
    "DPOTrainer": "trl_ext.trainers.dpo",
    "GroupBatch": "trl_ext.losses",
    "OnlineDPOConfig": "trl_ext.trainers.online.config",
    "OnlineDPOTrainer": "trl_ext.trainers.online.trainer",
    "PreferenceBatch": "trl_ext.losses",
    "PreferenceModel": "trl_ext.data.preference_model",
    "SFTConfig": "trl_ext.trainers.sft",
    "SFTTrainer": "trl_ext.trainers.sft",
    "Scores": "trl_ext.trainers.online.rewards",
    "Selection": "trl_ext.trainers.online.selection",
    "TokenBatch": "trl_ext.losses",
    "get_loss": "trl_ext.losses",
    "list_losses": "trl_ext.losses",
    "patch_trl": "trl_ext.trainers.patch",
    "register_loss": "trl_ext.losses",
}

__all__ = [
    "Completions",
    "DPOConfig",
    "DPOTrainer",
    "GroupBatch",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PreferenceBatch",
    "PreferenceModel",
    "SFTConfig",
    "SFTTrainer",
    "Scores",
    "Selection",
    "TokenBatch",
    "__version__",
    "get_loss",
    "list_losses",
    "patch_trl",
    "register_loss",
]

if TYPE_CHECKING:
    from trl_ext.data.preference_model import PreferenceModel
    from trl_ext.generation import Completions
    from trl_ext.losses import GroupBatch, PreferenceBatch, TokenBatch, get_loss, list_losses, register_loss
    from trl_ext.trainers.dpo import DPOTrainer
    from trl_ext.trainers.dpo_config import DPOConfig
    from trl_ext.trainers.online.config import OnlineDPOConfig
    from trl_ext.trainers.online.rewards import Scores
    from trl_ext.trainers.online.selection import Selection
    from trl_ext.trainers.online.trainer import OnlineDPOTrainer
    from trl_ext.trainers.patch import patch_trl
    from trl_ext.trainers.sft import SFTConfig, SFTTrainer


def __getattr__(name: str):
    if name not in _ORIGIN:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}")
    from trl_ext.upstream import names_explained

    with names_explained():
        value = getattr(importlib.import_module(_ORIGIN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
