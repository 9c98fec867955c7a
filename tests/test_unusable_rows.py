"""Rows that would end in an error of the device, or count for nothing."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import preference_rows
from tests.helpers import build
from trl_ext import DPOConfig, DPOTrainer


TOKENS = {"prompt_ids": [7, 8], "chosen_ids": [9, 10], "rejected_ids": [11]}


def embeddings(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir).get_input_embeddings().num_embeddings


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("split", ["train", "eval", "other"])
def test_a_token_that_the_model_does_not_know(name, split, tiny_model_dir, tmp_path):
    number = embeddings(tiny_model_dir)
    whole = Dataset.from_list([TOKENS] * 1200)
    last = Dataset.from_list([*[TOKENS] * 1150, {**TOKENS, name: [5, number - 1]}, *[TOKENS] * 49])
    beyond = Dataset.from_list([*[TOKENS] * 1150, {**TOKENS, name: [5, number]}, *[TOKENS] * 49])

    def trainer(data):
        given = {"train": (data, whole), "eval": (whole, data), "other": (whole, {"mine": whole, "other": data})}[
            split
        ]
        more = {"trainer_kwargs": {"eval_dataset": given[1]}}
        return build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=given[0], **more)

    trainer(last)
    with pytest.raises(
        ValueError, match=rf"Row 1150 of the {split} dataset has the token id {number} or .*'{name}'.*resize_token"
    ):
        trainer(beyond)


def test_before_the_reference_reads_it(tiny_model_dir, tmp_path):
    beyond = Dataset.from_list([TOKENS, {**TOKENS, "chosen_ids": [embeddings(tiny_model_dir)]}])
    with pytest.raises(ValueError, match="Row 1 of the train dataset has the token id"):
        build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=beyond, precompute_ref_log_probs=True)


def test_a_tokenizer_with_more_tokens_than_the_model(tiny_model_dir, tmp_path):
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in preference_rows(4)]
    rows[2]["chosen"] += " <new>"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens([f"<{i}>" for i in range(embeddings(tiny_model_dir) - len(tokenizer))] + ["<new>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    given = {"args": args, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="Row 2 of the train dataset has the token id"):
        DPOTrainer(model=model, **given)
    model.resize_token_embeddings(len(tokenizer))
    DPOTrainer(model=model, **given)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_weights_that_are_all_0(split, tiny_model_dir, tmp_path):
    def weighted(*values):
        return Dataset.from_list(
            [{**row, "weight": value} for row, value in zip(preference_rows(3), values, strict=True)]
        )

    some, none = weighted(0.0, 0.5, 0.0), weighted(0.0, 0.0, 0.0)
    train, held_out = (none, some) if split == "train" else (some, none)
    with pytest.raises(ValueError, match=f"All weights of the {split} dataset are 0"):
        build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=train, trainer_kwargs={"eval_dataset": held_out}
        )
    build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=some, trainer_kwargs={"eval_dataset": some})
