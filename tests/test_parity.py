"""With TRL's loss types a run is TRL's run, to the last bit."""

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import TRL_LOSSES, assert_same_parameters, build, history, parameters
from trl_ext.losses import TRL_LOSS_TYPES


def both(model_dir, tmp_path, *, config_class=trl_ext.DPOConfig, **kwargs):
    """TRL's run and ours."""
    runs = []
    for trainer_class, config in ((trl.DPOTrainer, trl.DPOConfig), (trl_ext.DPOTrainer, config_class)):
        trainer = build(trainer_class, config, model_dir, tmp_path / trainer_class.__module__, **kwargs)
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    return runs


def assert_same_run(theirs, ours):
    assert history(theirs) == history(ours)
    assert_same_parameters(parameters(theirs), parameters(ours))


def test_all_of_trls_loss_types_are_covered():
    assert set(TRL_LOSSES) == set(TRL_LOSS_TYPES)


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_loss_type(loss_type, tiny_model_dir, tmp_path):
    assert_same_run(*both(tiny_model_dir, tmp_path, loss_type=loss_type, **TRL_LOSSES[loss_type]))


@pytest.mark.parametrize("config_class", [trl.DPOConfig, trl_ext.DPOConfig])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", ["sigmoid", "bco_pair", "sft"]])
def test_peft(loss_type, config_class, tiny_model_dir, tmp_path):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    runs = both(
        tiny_model_dir,
        tmp_path,
        config_class=config_class,
        loss_type=loss_type,
        trainer_kwargs={"peft_config": peft_config},
    )
    assert_same_run(*runs)


@pytest.mark.parametrize(
    "overrides",
    [
        {"precompute_ref_log_probs": True},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        {"bf16": True},
        {"gradient_checkpointing": False, "max_length": 12},
        {"remove_unused_columns": False},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_option(overrides, tiny_model_dir, tmp_path):
    assert_same_run(*both(tiny_model_dir, tmp_path, **overrides))


def test_trls_config_class(tiny_model_dir, tmp_path):
    assert_same_run(*both(tiny_model_dir, tmp_path, config_class=trl.DPOConfig, loss_type=["hinge", "sft"]))


def test_without_config(tiny_model_dir, tmp_path, monkeypatch):
    # The default is bf16, which transformers refuses without a GPU; here it matters what is built, not what runs
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    trainer = trl_ext.DPOTrainer(model=str(tiny_model_dir), train_dataset=Dataset.from_list(preference_rows(4)))
    assert trainer.loss_types == ["sigmoid"]
    assert isinstance(trainer.args, trl.DPOConfig)
