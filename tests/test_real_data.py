"""Training on real scored preferences raises the preference accuracy on pairs that were held out."""

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.conftest import build_tokenizer
from tests.helpers import OUR_LOSSES, REFERENCE_FREE, options
from trl_ext import DPOConfig, DPOTrainer


@pytest.fixture(scope="module")
def imdb(shared_data, tmp_path_factory):
    """Sentiment pairs with a clear margin, and a small model that has seen some of their texts."""
    files = {split: str(shared_data / "imdb_sentiment" / f"pairs_{split}.jsonl") for split in ("train", "test")}
    dataset = load_dataset("json", data_files=files, cache_dir=str(tmp_path_factory.mktemp("cache")))
    dataset = dataset.filter(lambda row: row["score_chosen"] - row["score_rejected"] > 1)
    tokenizer = build_tokenizer(row["prompt"] + row["chosen"] for row in dataset["train"])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("imdb-model")
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)

    def with_empty_trace(row):
        # These reviews have no traces: the real texts stand in for both pairs, a made-up trace before one of them
        trace = "<think>\nso\n</think>\n\n"
        return {f"{side}_empty_trace": row[side] for side in ("chosen", "rejected")} | {
            side: trace + row[side] for side in ("chosen", "rejected")
        }

    return path, dataset, dataset.map(with_empty_trace)


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
def test_held_out_accuracy_rises(loss_type, imdb, tmp_path):
    path, plain, traced = imdb
    dataset = traced if loss_type == "bias_variance" else plain
    # The first round of self-play, without the policy that it began with; scores that are no win rates
    first_round = {f"initial_{side}_logps": 0.0 for side in ("chosen", "rejected")}
    dataset = dataset.map(lambda row: first_round)
    if loss_type == "step_apo":  # scores stand for the values of a search
        dataset = dataset.rename_columns({"score_chosen": "q_chosen", "score_rejected": "q_rejected"})
    loss_kwargs = {"inpo": {"tau": 0.0}, "sppo_soft": {"target": "score"}}.get(loss_type)
    assert isinstance(dataset["train"], Dataset)
    trainer = DPOTrainer(
        model=str(path),
        args=DPOConfig(
            **options(
                tmp_path,
                loss_type=loss_type,
                loss_kwargs=loss_kwargs,
                max_steps=60,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                per_device_eval_batch_size=32,
                max_length=96,
                logging_steps=20,
                gradient_checkpointing=False,
            )
        ),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
    )
    before = trainer.evaluate()
    if loss_type not in REFERENCE_FREE:
        # Where policy and reference agree, every pair is a tie: half of them right by chance
        assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert after["eval_loss"] < before["eval_loss"]
    if loss_type in REFERENCE_FREE:  # sums of log-probs, of which the longer completion has the lower one at first
        assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"] + 0.1
    else:
        assert after["eval_rewards/accuracies"] > 0.6


def test_what_two_models_have_learnt_is_distilled(imdb, tmp_path):
    """A policy that is shown the chosen texts alone, and no label, comes to prefer held-out ones as its teachers do."""
    path, dataset, _ = imdb

    def build(name, data, loss_type, **given):
        config = DPOConfig(
            **options(
                tmp_path / name, loss_type=loss_type, max_steps=25, per_device_train_batch_size=8, learning_rate=1e-3,
                per_device_eval_batch_size=32, max_length=96, logging_steps=25, gradient_checkpointing=False,
            )
        )  # fmt: skip
        return DPOTrainer(model=str(path), args=config, train_dataset=data, eval_dataset=dataset["test"], **given)

    swapped = dataset["train"].rename_columns({"chosen": "rejected", "rejected": "chosen"})
    teachers = {}
    for name, data in (("teacher_model", dataset["train"]), ("reverse_model", swapped)):
        trainer = build(name, data, "sigmoid")
        trainer.train()
        teachers[name] = trainer.model
    trainer = build("policy", dataset["train"], "aligndistil", **teachers)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_divergence/per_token"] < 0.5 * before["eval_divergence/per_token"]
    # TRL's rewards: sums of log-probs, of which that of the chosen text gains on the other
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"] + 0.1
