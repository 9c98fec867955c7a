"""Says which private name of TRL has moved, when one has."""

import inspect

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.trainer import utils

from tests.conftest import preference_rows
from tests.helpers import build, first_batch
from tests.online.runs import online
from trl_ext.logprobs import Head
from trl_ext.trainers import trl_seam


def test_methods_are_there():
    for name in trl_seam.DPO_METHODS:
        assert callable(getattr(trl.DPOTrainer, name)), name


def test_attributes_are_there(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    for name in trl_seam.DPO_ATTRIBUTES:
        assert hasattr(trainer, name), name


def test_online_names():
    for name in trl_seam.ONLINE_METHODS:
        assert callable(getattr(OnlineDPOTrainer, name)), name
    names = list(inspect.signature(OnlineDPOTrainer._generate).parameters)
    assert names == ["self", "model", "prompts", "images"]
    assert list(inspect.signature(OnlineDPOTrainer._generate_vllm).parameters) == ["self", "prompts", "images"]


def test_online_attributes(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, cls=OnlineDPOTrainer, config=OnlineDPOConfig)
    for name in trl_seam.ONLINE_ATTRIBUTES:
        assert hasattr(trainer, name), name


def test_online_arguments_are_trls():
    import trl_ext

    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (OnlineDPOTrainer, trl_ext.OnlineDPOTrainer))
    assert list(ours) == [*theirs, "preference_fn"]
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_signatures():
    def names(method):
        return list(inspect.signature(method).parameters)

    trainer = trl.DPOTrainer
    assert names(trainer.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert names(trainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    assert names(trainer._prepare_dataset) == ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert names(trainer._precompute_ref_logps) == ["self", "dataset", "name", "batch_size"]
    assert names(trainer.evaluate) == ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]


def test_arguments_of_the_trainer_are_trls():
    import trl_ext

    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (trl.DPOTrainer, trl_ext.DPOTrainer))
    assert list(ours) == [*theirs, "reward_model"]
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_keys_that_the_model_is_not_called_with():
    keys = "{" + ", ".join(f'"{key}"' for key in trl_seam.NON_MODEL_KEYS) + "}"
    for method in (trl.DPOTrainer._compute_loss, trl.DPOTrainer.compute_ref_log_probs):
        assert f"_non_model_keys = {keys}" in inspect.getsource(method)


def test_batch_keys_of_trls_collator(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, precompute_ref_log_probs=True)
    expected = {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
    assert set(first_batch(trainer)) == expected


def test_fused_output(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, use_weighting=True)
    batch = first_batch(trainer)
    output = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    rows, width = batch["input_ids"].shape
    for name in trl_seam.ROW_FIELDS:
        assert output[name].shape == (rows, width - 1), name
    assert set(output.keys()) == {"loss", *trl_seam.ROW_FIELDS}


def test_fused_forward_has_the_parts_that_are_replaced():
    """`head_in_place` substitutes the head, `bind_forward` the closure's own forward."""
    names = list(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters)
    assert names == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ]  # fmt: skip
    source = inspect.getsource(utils.add_fused_lm_head)
    assert "_ChunkedLogProbFunction.apply(" in source
    assert "compact = _use_triton(hidden_states.device)" in source
    assert "log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = per_token" in source
    assert callable(utils.maybe_gather_lm_head_ctx)


def test_fused_forward_keeps_the_forward_it_replaced(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = model.forward
    utils.add_fused_lm_head(model)
    function = model.forward.__func__
    assert function.__code__.co_name == "_fused_forward"
    assert inspect.getclosurevars(function).nonlocals["original_forward"] == before
    trl_seam.unbind_forward(model)
    assert model.forward == before


def test_head_in_place_is_what_runs(tiny_model_dir, tmp_path, monkeypatch):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    batch, seen = first_batch(trainer), []
    monkeypatch.setattr(
        Head, "__call__", lambda *args, real=Head.__call__, **kwargs: seen.append(1) or real(*args, **kwargs)
    )
    with trl_seam.head_in_place(Head("torch"), ()):
        ours = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    assert seen == [1]
    theirs = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    assert seen == [1]
    torch.testing.assert_close(ours.log_probs, theirs.log_probs)
    assert not ours.entropy.any() and theirs.entropy.any()


def test_metrics_of_each_statistic(tiny_model_dir, tmp_path):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    trainer.model.train()
    trainer.compute_loss(trainer.model, first_batch(trainer))
    for names in trl_seam.METRICS_OF.values():
        for name in names:
            assert len(trainer._metrics["train"][name]) == 1, name


def test_reference_cache_key():
    dataset = Dataset.from_list(preference_rows(4))
    keyed = trl_seam.with_cache_key(dataset, 1024, None)
    assert keyed._fingerprint != dataset._fingerprint
    assert keyed._fingerprint == trl_seam.with_cache_key(dataset, 1024, None)._fingerprint
    assert keyed._fingerprint != trl_seam.with_cache_key(dataset, 512, None)._fingerprint
    assert keyed.to_list() == dataset.to_list()
