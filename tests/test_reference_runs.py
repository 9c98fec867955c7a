"""Runs whose reference follows the policy, is an adapter, or was precomputed."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import (
    OUR_LOSSES,
    REFERENCE_FREE,
    assert_same_parameters,
    build,
    history,
    options,
    parameters,
)
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.trainers.reference import SyncReferenceAdapter, add_reference_adapter


@pytest.mark.parametrize("loss_type", ["sigmoid", "offset", "sppo_soft"])
def test_a_reference_that_follows_the_policy(loss_type, tiny_model_dir, tmp_path):
    """Every second step the reference is `0.25 policy + 0.75 reference`, by hand from the weights at that step."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, max_steps=4, learning_rate=1e-2,
        sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, trainer_kwargs={"callbacks": [Watch()]},
    )  # fmt: skip
    expected = {name: value.detach().clone() for name, value in trainer.ref_model.state_dict().items()}
    trainer.train()
    for step in (1, 3):
        expected = {name: 0.25 * seen[step][name] + 0.75 * value for name, value in expected.items()}
    for name, value in trainer.ref_model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    # The third step is the first that is measured against the moved reference
    margins = [entry["rewards/margins"] for entry in history(trainer)[:4]]
    assert margins[0] == pytest.approx(0, abs=1e-6) and abs(margins[2]) > 1e-6


def test_an_adapter_that_follows_another():
    """The reference adapter moves by `ref_model_mixup_alpha`, every `ref_model_sync_steps` steps."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(3, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    add_reference_adapter(model)
    of = lambda name: {n: p for n, p in model.named_parameters() if f".{name}." in n}  # noqa: E731
    before = {name: value.detach().clone() for name, value in of("ref").items()}
    assert len(before) == 2 and not any(value.requires_grad for value in of("ref").values())
    for name, value in of("default").items():
        torch.testing.assert_close(before[name.replace(".default.", ".ref.")], value.detach())
        value.data += 1.0
    args = SimpleNamespace(ref_model_sync_steps=3, ref_model_mixup_alpha=0.25)
    callback = SyncReferenceAdapter()
    for step in (1, 2):
        callback.on_step_end(args, SimpleNamespace(global_step=step), None, model=model)
    for name, value in of("ref").items():
        assert torch.equal(value, before[name])
    callback.on_step_end(args, SimpleNamespace(global_step=3), None, model=model)
    for name, value in of("ref").items():
        torch.testing.assert_close(value, before[name] + 0.25)


@pytest.mark.parametrize("loss_type", [name for name in OUR_LOSSES if name not in REFERENCE_FREE])
def test_adapter_that_was_trained_before(loss_type, tiny_model_dir, tmp_path):
    """The reference of a PEFT model that comes with an adapter is that adapter, so the first loss is that at delta 0."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**options(tmp_path, loss_type=loss_type)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        train_dataset=Dataset.from_list(preference_rows(8)),
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["logratios/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_stale_reference_cache_is_not_read(tiny_model_dir, tmp_path):
    """Precomputed reference log-probs depend on `max_length` and `ld_alpha`, which TRL's cache key leaves out."""
    path = tmp_path / "data.jsonl"
    Dataset.from_list(preference_rows(8)).to_json(path)
    sums = []
    for overrides in ({}, {"ld_alpha": 0.0}, {"max_length": 14}, {}):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "out", precompute_ref_log_probs=True,
            dataset=Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")), **overrides,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
        sums.append(sum(trainer.train_dataset["ref_chosen_logps"]))
    assert sums[0] == sums[3]
    assert len(set(sums)) == 3


def test_a_reference_that_moved_is_resumed(tiny_model_dir, tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
               "learning_rate": 1e-2}  # fmt: skip

    def make(folder):
        return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path / folder, **options)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(parameters(resumed), parameters(whole))
    for name, value in whole.ref_model.state_dict().items():
        assert torch.equal(value, resumed.ref_model.state_dict()[name]), name
