"""Averages of checkpoints."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

import trl_ext
from tests.helpers import build
from trl_ext.merging import MergeCheckpointsCallback, checkpoint_weights, merge_checkpoints


def checkpoint(folder, step, loss):
    folder.mkdir(parents=True)
    state = {"global_step": step, "log_history": [{"loss": loss, "step": step}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_weights(tmp_path):
    folders = [checkpoint(tmp_path / f"{i}", i + 1, loss) for i, loss in enumerate((0.5, 1.0))]
    assert checkpoint_weights(folders) == pytest.approx([2 / 3, 1 / 3])
    assert checkpoint_weights(folders, "loss", 2.0) == pytest.approx([0.8, 0.2])
    assert checkpoint_weights(folders, "step") == pytest.approx([1 / 3, 2 / 3])
    for by in ("loss", "step", "uniform"):
        assert checkpoint_weights(folders, by, 0.0) == [0.5, 0.5]
    assert sum(checkpoint_weights(folders, "loss", 5000.0)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="choose 'loss', 'step' or 'uniform'"):
        checkpoint_weights(folders, "accuracy")
    with pytest.raises(ValueError, match=r"no trainer_state\.json"):
        checkpoint_weights([tmp_path])


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_callback_averages_what_the_run_saved(peft, tiny_model_dir, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    kwargs = {"callbacks": [MergeCheckpointsCallback(by="step")], "peft_config": config if peft else None}
    trainer = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, save_strategy="steps", save_steps=1,
                    max_steps=2, trainer_kwargs=kwargs)  # fmt: skip
    trainer.train()

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir if peft else folder)
        return PeftModel.from_pretrained(model, folder).merge_and_unload() if peft else model

    first, second, merged = (
        dict(load(tmp_path / name).named_parameters()) for name in ("checkpoint-1", "checkpoint-2", "merged")
    )
    for name, value in merged.items():
        torch.testing.assert_close(value, first[name] / 3 + 2 * second[name] / 3, rtol=1e-4, atol=1e-5)


def test_refused(tmp_path):
    model, adapter = checkpoint(tmp_path / "a", 1, 1.0), checkpoint(tmp_path / "b", 2, 1.0)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="some are models"):
        merge_checkpoints([model, adapter], tmp_path / "out")
