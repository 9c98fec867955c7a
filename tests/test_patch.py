"""Our classes in TRL's place, in this process: the tests of other files find TRL as it was."""

import sys
import types

import pytest
import trl
import trl.experimental.online_dpo as online
import trl.trainer.dpo_config
import trl.trainer.dpo_trainer

import trl_ext
from trl_ext.trainers.patch import ONLINE, STABLE, patch_trl


@pytest.fixture
def trl_as_it_was():
    names = [*STABLE, *ONLINE]
    modules = [module for name, module in sys.modules.items() if name == "trl" or name.startswith("trl.")]
    before = [(module, dict(vars(module))) for module in modules]
    yield
    for module, attributes in before:
        for name in names:
            if name in attributes:
                setattr(module, name, attributes[name])
            elif name in vars(module):
                delattr(module, name)


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
