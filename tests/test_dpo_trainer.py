"""Our losses in the trainer: the right numbers through every path that TRL has."""

import copy
import math

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import (
    LOSS_METRICS,
    OF_TOKENS,
    OUR_LOSSES,
    REFERENCE_FREE,
    assert_same_parameters,
    build,
    history,
    metrics_of,
    parameters,
)
from trl_ext import DPOConfig, DPOTrainer


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
@pytest.mark.parametrize(
    "overrides",
    [{"precompute_ref_log_probs": True}, {"gradient_checkpointing": False}, {"remove_unused_columns": False}],
    ids=lambda overrides: "-".join(overrides),
)
def test_option_that_changes_no_number(loss_type, overrides, tiny_model_dir, tmp_path):
    if loss_type in REFERENCE_FREE and "precompute_ref_log_probs" in overrides:
        pytest.skip("nothing to precompute: refused, as tests/test_reference_free.py has it")
    if loss_type in OF_TOKENS and "precompute_ref_log_probs" in overrides:
        pytest.skip("tokens are not precomputed: refused, as tests/test_reads.py has it")
    runs = []
    for options in (overrides, {}):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / str(len(runs)), loss_type=loss_type, **options
        )
        trainer.train()
        evaluation = trainer.evaluate()
        runs.append(trainer)
    assert metrics_of(loss_type) <= history(runs[0])[0].keys()
    assert {f"eval_{name}" for name in LOSS_METRICS[loss_type]} <= evaluation.keys()
    assert_same_parameters(parameters(runs[1]), parameters(runs[0]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("loss_type", ["offset", "anchored", "bias_variance", "sppo_soft"])
def test_half_precision_is_close_to_full(loss_type, tiny_model_dir, tmp_path):
    losses = []
    for bf16 in (True, False):
        trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, bf16=bf16)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter *= 1.1  # the policy moves away from its reference
        trainer.train()
        losses.append([entry["loss"] for entry in history(trainer)[:3]])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
def test_stream_equals_dataset(loss_type, tiny_model_dir, tmp_path):
    rows = preference_rows(12)
    runs = []
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / type(dataset).__name__, loss_type=loss_type, dataset=dataset,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    assert isinstance(runs[1].train_dataset, IterableDataset)
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]))


def test_evaluation_of_a_dict_and_of_a_new_dataset(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list(preference_rows(8))
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=["bias_variance", "offset"], dataset=dataset,
        precompute_ref_log_probs=True, trainer_kwargs={"eval_dataset": {"a": dataset, "b": dataset.select(range(4))}},
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_empty_trace/share", "eval_b_empty_trace/share"} <= metrics.keys()
    # Each dataset's own, under its name: the first has 8 rows, the second the first 4 of them
    margins = [math.log(row["score_chosen"] - row["score_rejected"]) for row in dataset]
    assert metrics["eval_a_offset/mean"] == pytest.approx(sum(margins) / 8, rel=1e-5)
    assert metrics["eval_b_offset/mean"] == pytest.approx(sum(margins[:4]) / 4, rel=1e-5)
    assert "eval_offset/mean" not in metrics
    new = trainer.evaluate(Dataset.from_list(preference_rows(8)))
    assert new["eval_loss"] == pytest.approx(metrics["eval_a_loss"], rel=1e-6)
    with pytest.raises(ValueError, match=r"score_rejected.*eval dataset"):
        trainer.evaluate(dataset.remove_columns("score_rejected"))


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
def test_resumed_run_equals_the_uninterrupted_one(loss_type, tiny_model_dir, tmp_path):
    kwargs = {"loss_type": loss_type, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "run", **kwargs)
    whole.train()
    resumed = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "run", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_parameters(parameters(whole), parameters(resumed))
    for entry, again in zip(history(whole)[2:4], history(resumed)[2:4], strict=True):
        # TRL counts the tokens of a process, not of a run
        assert {**entry, "num_tokens": 0} == {**again, "num_tokens": 0}
    saved = torch.load(tmp_path / "run" / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert saved.loss_type == [loss_type]


def test_saved_model_loads(tiny_model_dir, tmp_path):
    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="offset")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same_parameters(parameters(trainer), dict(loaded.named_parameters()))


def test_the_users_own_collator(tiny_model_dir, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    seen = []

    class Collator(DataCollatorForPreference):
        def torch_call(self, examples):
            seen.append(set(examples[0]))
            return super().torch_call(examples)

    kwargs = {"loss_type": ["offset", "bias_variance"]}
    own = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "own",
        trainer_kwargs={"data_collator": Collator(pad_token_id=tokenizer.pad_token_id)}, **kwargs,
    )  # fmt: skip
    plain = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "plain", **kwargs)
    for trainer in (own, plain):
        trainer.train()
    assert seen
    assert_same_parameters(parameters(own), parameters(plain))


@pytest.mark.parametrize("loss_type", ["sigmoid", "offset", ["length_regularized", "margin_adaptive"]], ids=str)
def test_rows_that_are_token_ids_already(loss_type, tiny_model_dir, tmp_path):
    text = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "text", loss_type=loss_type)
    ids = text.train_dataset.select_columns(
        ["prompt_ids", "chosen_ids", "rejected_ids", "score_chosen", "score_rejected"]
    )
    tokens = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "ids", loss_type=loss_type, dataset=ids)
    for trainer in (text, tokens):
        trainer.train()
    assert_same_parameters(parameters(text), parameters(tokens))
    assert history(text) == history(tokens)


def test_metrics_of_a_prediction_have_its_prefix(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list(preference_rows(8))
    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="offset", dataset=dataset)
    metrics = trainer.predict(trainer.eval_dataset).metrics
    margins = [math.log(row["score_chosen"] - row["score_rejected"]) for row in dataset]
    assert metrics["test_offset/mean"] == pytest.approx(sum(margins) / 8, rel=1e-5)
    assert "test_loss" in metrics and not any(name.startswith("eval") for name in metrics)
    # And nothing of it is left for an evaluation
    assert trainer.evaluate()["eval_offset/mean"] == pytest.approx(sum(margins) / 8, rel=1e-5)


def test_plain_trl_config_with_our_loss(tiny_model_dir, tmp_path):
    trainer = build(DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, loss_type=["offset"])
    trainer.train()
    assert "offset/mean" in history(trainer)[0]


def test_a_registered_loss(tiny_model_dir, tmp_path, monkeypatch):
    from dataclasses import dataclass

    from trl_ext.losses import registry

    monkeypatch.setattr(registry, "_classes", copy.copy(registry._classes))
    monkeypatch.setattr(registry, "_aliases", copy.copy(registry._aliases))

    @trl_ext.register_loss("squared", aliases=["sq"])
    @dataclass(frozen=True)
    class Squared:
        target: float = 1.0

        def __call__(self, batch):
            return (batch.beta * batch.delta - self.target) ** 2

    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="sq", loss_kwargs={"target": 2.0})
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(4.0, abs=1e-5)

    @trl_ext.register_loss("reduced")
    @dataclass(frozen=True)
    class Reduced:
        def __call__(self, batch):
            return batch.delta.mean()

    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="reduced")
    with pytest.raises(
        ValueError, match=r"'reduced' returned shape \(\); expected one value per pair or group, shape \(4,\)"
    ):
        trainer.train()
