"""Our classes in TRL's place, in this process: the tests of other files find TRL as it was."""

import sys
import types

import trl
import trl.experimental.online_dpo as online
import trl.trainer.dpo_config
import trl.trainer.dpo_trainer

import trl_ext
from trl_ext.trainers.patch import patch_trl


def test_wherever_trl_offers_them(trl_as_it_was, monkeypatch):
    theirs = trl.DPOTrainer
    assert theirs is not trl_ext.DPOTrainer
    own, inner = types.ModuleType("trlx"), types.ModuleType("trl.inner")
    own.DPOTrainer = inner.DPOTrainer = theirs
    monkeypatch.setitem(sys.modules, "trlx", own)
    monkeypatch.setitem(sys.modules, "trl.inner", inner)
    patch_trl()
    for module in (trl, trl.trainer, trl.trainer.dpo_trainer, inner):
        assert module.DPOTrainer is trl_ext.DPOTrainer, module.__name__
    for module in (trl, trl.trainer, trl.trainer.dpo_config):
        assert module.DPOConfig is trl_ext.DPOConfig, module.__name__
    assert online.OnlineDPOTrainer is trl_ext.OnlineDPOTrainer and online.OnlineDPOConfig is trl_ext.OnlineDPOConfig
    # Modules of others keep what they have, and no module is given a name that it had not
    assert own.DPOTrainer is theirs and "DPOConfig" not in vars(inner)
    patch_trl()
    assert trl.DPOTrainer is trl_ext.DPOTrainer and theirs in trl_ext.DPOTrainer.__mro__


def test_a_trl_without_online_training(trl_as_it_was, monkeypatch):
    class Gone:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "trl.experimental.online_dpo":
                raise ImportError(name)

    monkeypatch.delitem(sys.modules, "trl.experimental.online_dpo")
    monkeypatch.setattr(sys, "meta_path", [Gone, *sys.meta_path])
    patch_trl()
    assert trl.DPOTrainer is trl_ext.DPOTrainer
    assert online.OnlineDPOTrainer is not trl_ext.OnlineDPOTrainer
