"""A round trains as `DPOTrainer` does on the pairs of that round, whatever it is asked to do with them."""

import json

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import history
from tests.test_rounds import TRAINING, prompts, run  # noqa: F401  (a fixture)
from trl_ext import DPOConfig, DPOTrainer


OPTIONS = {
    "logprob_backend=torch": {"logprob_backend": "torch"},
    "logprob_backend=liger": {"logprob_backend": "liger"},
    "alpha_dpo": {"loss_type": "alpha_dpo"},
    "beta_dpo": {"loss_type": "beta_dpo"},
    "robust_em": {"loss_type": "robust_em"},
    "dmpo": {"loss_type": "dmpo"},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "remembered reference": {"ref_logps_memory_mb": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_round_is_a_training_on_its_pairs(name, tiny_model_dir, prompts, tmp_path):  # noqa: F811
    given = {"max_steps": 3, "logging_steps": 1, **OPTIONS[name]}
    run(tiny_model_dir, prompts, tmp_path / "run", rounds=1, training=given)
    folder = tmp_path / "run" / "round-1"

    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32) for _ in range(2))
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path / "alone"), seed=0, **{**TRAINING, **given}),
        train_dataset=load_from_disk(folder / "pairs"),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    trainer.train()
    saved = load_file(folder / "model" / "model.safetensors")
    start = load_file(tiny_model_dir / "model.safetensors")
    assert any(not torch.equal(saved[key], start[key]) for key in saved)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(saved[key], value), key
    logged = json.loads((folder / "log.json").read_text())
    steps = [entry["loss"] for entry in logged if "loss" in entry]
    assert steps == [entry["loss"] for entry in history(trainer) if "loss" in entry] and len(steps) == 3
