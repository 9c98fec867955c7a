"""With TRL's loss types a run is TRL's run: to the last bit on TRL's log-probabilities, else within float tolerance."""

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import TRL_LOSSES, assert_same_parameters, build, history, parameters
from trl_ext.losses import TRL_LOSS_TYPES


TRLS = {"logprob_backend": "trl"}


def both(model_dir, tmp_path, *, ours, config_class=trl_ext.DPOConfig, **kwargs):
    """TRL's run and ours, which has the options `ours` too."""
    runs = []
    for trainer_class, config, extra in (
        (trl.DPOTrainer, trl.DPOConfig, {}),
        (trl_ext.DPOTrainer, config_class, ours),
    ):
        trainer = build(trainer_class, config, model_dir, tmp_path / trainer_class.__module__, **kwargs, **extra)
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    return runs


def assert_same_run(theirs, ours):
    assert history(theirs) == history(ours)
    assert_same_parameters(parameters(theirs), parameters(ours))


def assert_close_run(theirs, ours):
    assert len(history(theirs)) == len(history(ours))
    for their, our in zip(history(theirs), history(ours), strict=True):
        if (
            abs(their.get("rewards/margins", 1.0)) < 1e-4
        ):  # before the first update: the sign is that of a rounding error
            our, their = ({k: v for k, v in entry.items() if k != "rewards/accuracies"} for entry in (our, their))
        assert our == pytest.approx(their, rel=1e-3, abs=2e-4)
    assert_same_parameters(parameters(theirs), parameters(ours), rtol=1e-3, atol=5e-4)


def test_all_of_trls_loss_types_are_covered():
    assert set(TRL_LOSSES) == set(TRL_LOSS_TYPES)


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_loss_type(loss_type, tiny_model_dir, tmp_path):
    assert_same_run(*both(tiny_model_dir, tmp_path, ours=TRLS, loss_type=loss_type, **TRL_LOSSES[loss_type]))


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", ["sigmoid", "bco_pair", "sft"]])
def test_peft(loss_type, tiny_model_dir, tmp_path):
    peft = {"trainer_kwargs": {"peft_config": LoraConfig(**LORA)}}
    assert_same_run(*both(tiny_model_dir, tmp_path, ours=TRLS, loss_type=loss_type, **peft))


# The first step of Adam divides each gradient by its own size, so a run goes apart where one is a rounding error: SGD
BACKENDS = [
    {},
    {"share_prefix": True},
    {"share_prefix": False},
    {"logprob_backend": "torch", "logprob_memory_mb": 0.01},
    {"logprob_backend": "liger"},
]


@pytest.mark.parametrize("ours", BACKENDS, ids=lambda ours: "-".join(f"{k}={v}" for k, v in ours.items()) or "auto")
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_backend(peft, ours, tiny_model_dir, tmp_path):
    kwargs = {"trainer_kwargs": {"peft_config": LoraConfig(**LORA)}} if peft else {}
    kwargs |= {"optim": "sgd", "loss_type": ["sigmoid", "ipo", "sft"]}
    assert_close_run(*both(tiny_model_dir, tmp_path, ours=ours, **kwargs))


@pytest.mark.parametrize(
    "overrides",
    [
        {"precompute_ref_log_probs": True},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"max_length": 9, "truncation_mode": "keep_end"},
        {"max_length": 9},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_option_on_our_log_probabilities(overrides, tiny_model_dir, tmp_path):
    assert_close_run(*both(tiny_model_dir, tmp_path, ours={}, optim="sgd", **overrides))


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
    assert_same_run(*both(tiny_model_dir, tmp_path, ours=TRLS, **overrides))


def test_trls_config_class(tiny_model_dir, tmp_path):
    kwargs = {"config_class": trl.DPOConfig, "loss_type": ["hinge", "sft"], "optim": "sgd"}
    assert_close_run(*both(tiny_model_dir, tmp_path, ours={}, **kwargs))


def test_without_config(tiny_model_dir, tmp_path, monkeypatch):
    # The default is bf16, which transformers refuses without a GPU; here it matters what is built, not what runs
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    trainer = trl_ext.DPOTrainer(model=str(tiny_model_dir), train_dataset=Dataset.from_list(preference_rows(4)))
    assert trainer.loss_types == ["sigmoid"]
    assert isinstance(trainer.args, trl.DPOConfig)
