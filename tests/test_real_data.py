"""Training on real scored preferences raises the preference accuracy on pairs that were held out."""

import json

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.conftest import build_tokenizer
from tests.helpers import OUR_LOSSES, REFERENCE_FREE, options
from trl_ext import DPOConfig, DPOTrainer, PreferenceModel, SFTConfig, SFTTrainer
from trl_ext.data import score_preferences
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


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
                max_length=64,
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


def test_a_preference_model_learns_what_is_preferred(imdb, tmp_path):
    path, dataset, _ = imdb
    pairs = dataset.select_columns(["prompt", "chosen", "rejected"])
    args = options(
        tmp_path, preference_dim=4, max_steps=60, per_device_train_batch_size=8, learning_rate=1e-3,
        per_device_eval_batch_size=32, logging_steps=20, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = RewardTrainer(str(path), RewardConfig(**args), train_dataset=pairs["train"], eval_dataset=pairs["test"])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_accuracy"] > 0.6
    judge = PreferenceModel(trainer.model, trainer.processing_class)
    scored = score_preferences(pairs["test"].select(range(32)), judge=judge, cache_dir=tmp_path / "scores")
    assert sum(p > 0.5 for p in scored["preference_prob"]) / 32 > 0.55


def test_the_class_with_the_weight_is_learnt(imdb, shared_data, tmp_path):
    """Fine-tuned on reviews and on summaries, a model writes as the class of which rows count a hundred times as much."""
    path, reviews, _ = imdb

    def rows(split, kind, count, weight=1.0):
        if kind == "review":
            texts = [row["prompt"] + row["chosen"] for row in reviews[split].select(range(count))]
        else:
            lines = (shared_data / "tldr_likert" / f"{split}.jsonl").read_text().split("\n")[:count]
            texts = [json.loads(line)["chosen"] for line in lines]
        return [{"text": " ".join(text.split()[:16]), "condition": f"A {kind}:", "weight": weight} for text in texts]

    kinds = ("review", "summary")
    losses = []
    for weights in ((1.0, 0.01), (0.01, 1.0)):
        train = [row for kind, weight in zip(kinds, weights, strict=True) for row in rows("train", kind, 160, weight)]
        trainer = SFTTrainer(
            model=str(path),
            args=SFTConfig(
                **options(
                    tmp_path, max_steps=20, per_device_train_batch_size=16, learning_rate=3e-3, per_device_eval_batch_size=64,
                    gradient_checkpointing=False,
                )
            ),
            train_dataset=Dataset.from_list(train),
            eval_dataset={kind: Dataset.from_list(rows("test", kind, 50)) for kind in kinds},
        )  # fmt: skip
        trainer.train()
        logged = trainer.evaluate()
        losses.append([logged[f"eval_{kind}_loss"] for kind in kinds])
    (review, summary), (other_review, other_summary) = losses
    assert review < other_review - 0.05 and summary > other_summary + 0.05, losses


def test_real_conversations_turn_by_turn(shared_data, imdb, tmp_path):
    """Conversations from their first question on: earlier turns are shared, the last one is not."""
    path = str(shared_data / "hh_harmless" / "test_500.jsonl")
    dataset = load_dataset("json", data_files=path, split="train[:24]", cache_dir=str(tmp_path / "cache"))

    def whole(row):
        first, *rest = row["prompt"]
        return {"prompt": [first]} | {side: rest + row[side] for side in ("chosen", "rejected")}

    trainer = DPOTrainer(
        model=str(imdb[0]),
        args=DPOConfig(
            **options(
                tmp_path, loss_type="dmpo", max_steps=8, per_device_train_batch_size=6, learning_rate=1e-3, max_length=384,
                logging_steps=2, gradient_checkpointing=False, share_prefix=True,
            )
        ),
        train_dataset=dataset.map(whole),
    )  # fmt: skip
    for row, example in zip(dataset, trainer.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            assert max(example[f"{side}_turns"]) == len(row["prompt"]) // 2
            said = [
                number for number, turn in zip(example[f"{side}_ids"], example[f"{side}_turns"], strict=True) if turn >= 0
            ]  # fmt: skip
            texts = [message["content"] for message in [*row["prompt"], *row[side]] if message["role"] == "assistant"]
            written = trainer.processing_class.decode(said)
            assert written == "".join(f"{text}<|im_end|>\n" for text in texts)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "turns/chosen" in entry]
    assert first["turns/chosen"] > 1.5 and first["rewards/margins"] < last["rewards/margins"]


def test_what_two_models_have_learnt_is_distilled(imdb, tmp_path):
    """A policy that is shown the chosen texts alone, and no label, comes to prefer held-out ones as its teachers do."""
    path, dataset, _ = imdb

    def build(name, data, loss_type, **given):
        config = DPOConfig(
            **options(
                tmp_path / name, loss_type=loss_type, max_steps=25, per_device_train_batch_size=8, learning_rate=1e-3,
                per_device_eval_batch_size=32, max_length=64, logging_steps=25, gradient_checkpointing=False,
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
