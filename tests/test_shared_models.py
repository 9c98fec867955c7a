"""One model in two trainers, its deep copies, and references of another kind."""

import copy
import logging

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch, loss_and_gradients
from trl_ext.trainers.trl_seam import fused_forward


@pytest.mark.parametrize("backend", ["trl", "auto"])
def test_a_deep_copy_runs_its_own_weights(backend, tiny_model_dir, tmp_path):
    trainer = ours(tiny_model_dir, tmp_path, logprob_backend=backend)
    twin = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    batch = {k: v for k, v in first_batch(trainer).items() if k in ("input_ids", "attention_mask", "completion_mask")}
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.5)
        kwargs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        assert torch.equal(twin(**kwargs).logits, fresh(**kwargs).logits)
        assert not torch.equal(twin(**kwargs).logits, trainer.model(**kwargs).logits)
        original, copied = (fused_forward(model, batch, False).log_probs for model in (trainer.model, twin))
        assert not torch.equal(original, copied)


@pytest.mark.parametrize("first", [trl.DPOTrainer, trl_ext.DPOTrainer])
def test_a_second_trainer_on_the_model_or_on_its_copy(first, tiny_model_dir, tmp_path):
    config = trl.DPOConfig if first is trl.DPOTrainer else trl_ext.DPOConfig
    trained = build(first, config, tiny_model_dir, tmp_path, loss_type="sft")
    trained.train()
    results = []
    for model in (trained.model, copy.deepcopy(trained.model)):
        reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        trainer = second_trainer(model, reference, tiny_model_dir, tmp_path)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        results.append(loss_and_gradients(trainer, first_batch(trainer)))
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            assert not model(input_ids=ids).logits.any()
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0] != pytest.approx(0.6931, abs=1e-3)  # the policy has moved away from the reference


def second_trainer(model, reference, model_dir, tmp_path):
    from transformers import AutoTokenizer

    from tests.helpers import options

    return trl_ext.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl_ext.DPOConfig(**options(tmp_path)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=Dataset.from_list(preference_rows(4)),
    )


def test_generation_after_training(tiny_model_dir, tmp_path):
    trainer = ours(tiny_model_dir, tmp_path)
    trainer.train()
    assert trainer.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 6)


def test_a_reference_that_cannot_share_prompts(tiny_model_dir, tmp_path, caplog):
    """The reference reads the same batches, so a recurrent one keeps both models on plain rows."""
    from tests.logprobs.families import INEXACT, tiny

    def reference():
        return tiny("mamba", {**INEXACT["mamba"][0], "vocab_size": 400})

    with caplog.at_level(logging.WARNING):
        trainer = ours(tiny_model_dir, tmp_path, loss_type="offset", trainer_kwargs={"ref_model": reference()})
    assert trainer._scorer.sharing is None
    assert "of the reference model, it has layers of type" in caplog.text
    batch = first_batch(trainer)
    loss, _ = loss_and_gradients(trainer, batch)
    theirs = ours(
        tiny_model_dir, tmp_path, loss_type="offset", logprob_backend="trl", trainer_kwargs={"ref_model": reference()}
    )
    torch.testing.assert_close(loss, loss_and_gradients(theirs, batch)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"share_prefix=True.* of the reference model"):
        ours(tiny_model_dir, tmp_path, share_prefix=True, trainer_kwargs={"ref_model": reference()})


def ours(tiny_model_dir, tmp_path, **kwargs):
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **kwargs)
