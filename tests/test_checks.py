"""Rows and settings that would teach nothing, or something that nobody meant, are named before training."""

import json
import logging
from types import SimpleNamespace

import pytest
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset
from transformers import AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, parameters
from tests.online.runs import online
from trl_ext.data.checks import check_tokenized, is_empty
from trl_ext.data.texts import checked_texts
from trl_ext.data.tokens import require_chat_template
from trl_ext.losses import loss_class
from trl_ext.losses.base import warn_once
from trl_ext.trainers.checkpoints import CONTENTS


def tokenized(*rows):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])


PROMPT, LONG = [5, 6, 7], [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("side", [1, 2])
def test_a_tokenized_row_without_a_completion_is_refused(side, stream):
    row = [PROMPT, [8], [9]]
    row[side] = []
    data = tokenized((PROMPT, [8], [9]), row)
    message = rf"Row 1 of the train dataset has no token in '{('chosen_ids', 'rejected_ids')[side - 1]}'"
    with pytest.raises(ValueError, match=message):
        list(check_tokenized(data.to_iterable_dataset() if stream else data, "train", None, True))


@pytest.mark.parametrize("stream", [False, True])
def test_tokenized_prompts_that_leave_no_room_are_left_out(stream, caplog):
    data = tokenized((PROMPT, [8], [9]), (LONG, [8], [9]), ([5] * 5, [8], [9]))
    data = data.to_iterable_dataset() if stream else data
    kept = list(check_tokenized(data, "train", 6, True))
    assert [row["prompt_ids"] for row in kept] == [PROMPT, [5] * 5]  # at 6 tokens nothing is left, at 5 one is
    assert stream or "1 of 3 rows of the train dataset were dropped" in caplog.text
    # What keeps the end keeps the completion
    assert len(list(check_tokenized(data, "train", 6, False))) == 3
    assert len(list(check_tokenized(data, "train", None, True))) == 3


def test_no_tokenized_row_is_left(caplog):
    with pytest.raises(ValueError, match="All 2 prompts of the eval dataset have `max_length=3` tokens or more"):
        check_tokenized(tokenized((PROMPT, [8], [9]), (LONG, [8], [9])), "eval", 3, True)


def test_tokenized_rows_in_the_trainer(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="Row 0 of the train dataset has no token in 'chosen_ids'"):
        build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=tokenized((PROMPT, [], [9])))
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, max_length=6,
        dataset=tokenized((PROMPT, [8], [9]), (LONG, [8], [9])),
    )  # fmt: skip
    assert trainer.train_dataset["prompt_ids"][:] == [PROMPT]


def test_rows_that_trl_drops_are_counted(tiny_model_dir, tmp_path, caplog):
    rows = preference_rows(4)
    rows[2]["prompt"] = "what " * 40
    build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(rows), max_length=30
    )
    assert "1 of 4 rows of the train dataset were dropped" in caplog.text
    with pytest.raises(ValueError, match="All 4 prompts of the train dataset"):
        build(
            trl_ext.DPOTrainer,
            trl_ext.DPOConfig,
            tiny_model_dir,
            tmp_path,
            dataset=Dataset.from_list(rows),
            max_length=2,
        )


def says(*contents):
    return [{"role": "assistant", "content": content} for content in contents]


@pytest.mark.parametrize(
    ("completion", "empty"),
    [("", True), ("  \n", True), ("a", False), (None, False), ([], True), (says(""), True), (says("", "a"), False),
     (says(None), True), ([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], False)],
)  # fmt: skip
def test_what_is_empty(completion, empty):
    assert is_empty(completion) is empty


def test_empty_completions_are_counted(caplog):
    rows = [{"prompt": "a", "chosen": text, "rejected": other} for text, other in (("b", "c"), ("", "c"), ("b", " "))]
    checked_texts(Dataset.from_list(rows), "train")
    assert "2 of 3 pairs of the train dataset have an empty completion, the first in row 1" in caplog.text
    caplog.clear()
    checked_texts(Dataset.from_list(rows[:1]), "train")
    checked_texts(Dataset.from_list(rows).to_iterable_dataset(), "train")
    assert not caplog.text


def test_empty_completions_are_named_in_training(tiny_model_dir, tmp_path, caplog):
    rows = preference_rows(4)
    rows[3]["rejected"] = ""
    build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(rows),
          trainer_kwargs={"eval_dataset": None})  # fmt: skip
    assert "1 of 4 pairs of the train dataset have an empty completion, the first in row 3" in caplog.text


@pytest.mark.parametrize("loss_type", ["sigmoid", "offset"])
def test_conversations_need_a_chat_template(loss_type, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{side: says(row[side]) for side in ("chosen", "rejected")},
                **{name: row[name] for name in ("score_chosen", "score_rejected")},
            }
            for row in preference_rows(4)
        ]
    )
    with pytest.raises(ValueError, match=r"The texts are conversations, and the tokenizer .* has no chat template"):
        trl_ext.DPOTrainer(
            model=str(tiny_model_dir),
            args=trl_ext.DPOConfig(output_dir=str(tmp_path), loss_type=loss_type, bf16=False, use_cpu=True),
            train_dataset=data,
            processing_class=tokenizer,
        )


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(
        ValueError, match=r"The texts are conversations, and the tokenizer 'mine' has no chat template"
    ):
        require_chat_template(SimpleNamespace(chat_template=None, name_or_path="mine"))
    with pytest.raises(ValueError, match=r"the tokenizer '' has no chat template"):
        require_chat_template(object())  # what has no name and no such attribute
    require_chat_template(SimpleNamespace(chat_template="x"))


def test_text_needs_no_template(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    trainer = trl_ext.DPOTrainer(
        model=str(tiny_model_dir),
        args=trl_ext.DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(preference_rows(4)),
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 4


def test_beta_of_zero_teaches_nothing(tmp_path, caplog):
    def warned(**kwargs):
        caplog.clear()
        warn_once.cache_clear()
        trl_ext.DPOConfig(output_dir=str(tmp_path), bf16=False, **kwargs)
        return [record.message for record in caplog.records if "teach nothing" in record.message]

    caplog.set_level(logging.WARNING)
    (message,) = warned(beta=0.0, loss_type=["sigmoid", "offset", "sft", "inpo"])
    assert "the losses ['sigmoid', 'offset'] do not depend on the policy" in message
    assert not warned(beta=0.0, loss_type="inpo")
    assert not warned(beta=0.0, loss_type="sft")
    assert not warned(beta=0.0, loss_type="anchored", loss_kwargs={"tau": 2.0})
    assert warned(beta=0.0, loss_type="bias_variance")
    assert warned(beta=0.0, loss_type="bias_variance", loss_kwargs={"base": "margin_adaptive"})
    assert not warned(beta=0.1, loss_type="sigmoid")


@pytest.mark.parametrize("loss_type", ["ipo", "sppo_hard", "sppo_soft", "anchored"])
def test_beta_of_zero_where_it_divides(loss_type, tmp_path):
    with pytest.raises(ValueError, match=rf"`beta=0` has no meaning for \['{loss_type}'\]"):
        trl_ext.DPOConfig(output_dir=str(tmp_path), bf16=False, beta=0.0, loss_type=loss_type)


def test_anchored_without_anything_to_anchor_is_plain_dpo(tiny_model_dir, tmp_path, caplog):
    plain = Dataset.from_list(preference_rows(4)).select_columns(["prompt", "chosen", "rejected"])

    def warned(dataset, **kwargs):
        caplog.clear()
        build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=dataset, **kwargs)
        return "which is plain DPO" in caplog.text

    assert warned(plain, loss_type="anchored")
    assert not warned(plain, loss_type="anchored", loss_kwargs={"label_smoothing": 0.1})
    assert not warned(Dataset.from_list(preference_rows(4)), loss_type="anchored")
    assert not warned(plain, loss_type="length_regularized")


def test_how_sure_a_formula_is_stands_in_the_log_once(tiny_model_dir, tmp_path, caplog):
    """Of the losses in use that state it, whichever trainer has them."""

    def said(trainer, **kwargs):
        caplog.clear()
        trainer(tiny_model_dir, tmp_path, **kwargs)
        messages = [record.message.removeprefix("[RANK 0] ") for record in caplog.records]
        return [message for message in messages if message.startswith("How sure")]

    def offline(*args, **kwargs):
        return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, *args, **kwargs)

    MultiProcessAdapter.warning_once.cache_clear()
    messages = said(offline, loss_type=["asft", "offset", "sigmoid", "step_apo"])
    assert messages == [
        f"How sure the formula of {name!r} is: {loss_class(name).evidence}" for name in ("asft", "step_apo")
    ]
    assert said(offline, loss_type=["asft", "offset"]) == []
    assert said(offline, loss_type=["cpo", "simpo"]) == []
    (message,) = said(online, loss_type=["eurus", "asft"])
    assert message.startswith("How sure the formula of 'eurus' is: The objective is the paper's")


class TestResumingWithOtherLosses:
    SAVED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}

    def run(self, model_dir, tmp_path, **kwargs):
        return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path / "run", **self.SAVED, **kwargs)

    @pytest.mark.parametrize(
        "other",
        [
            {"loss_type": "length_regularized"},
            {"loss_type": "offset", "loss_kwargs": {"alpha": 0.4}},
            {"loss_type": ["offset", "sft"], "loss_kwargs": {"alpha": 0.5}},
            {"loss_type": "sigmoid"},
            {"loss_type": "offset", "loss_kwargs": {"alpha": 0.5}, "loss_weights": [2.0]},
        ],
        ids=str,
    )
    def test_is_refused(self, other, tiny_model_dir, tmp_path):
        first = {"loss_type": "offset", "loss_kwargs": {"alpha": 0.5}}
        whole = self.run(tiny_model_dir, tmp_path, **first)
        whole.train()
        checkpoint = str(tmp_path / "run" / "checkpoint-1")
        with pytest.raises(
            ValueError, match=r"was trained with the losses .*offset.* A resumed run continues the same"
        ):
            self.run(tiny_model_dir, tmp_path, **other).train(resume_from_checkpoint=checkpoint)
        again = self.run(tiny_model_dir, tmp_path, **first)
        again.train(resume_from_checkpoint=checkpoint)
        assert_same_parameters(parameters(again), parameters(whole))

    def test_checkpoints_that_say_nothing_pass(self, tiny_model_dir, tmp_path):
        self.run(tiny_model_dir, tmp_path).train()
        path = tmp_path / "run" / "checkpoint-1" / "losses.json"
        assert json.loads(path.read_text()) == {"sigmoid": {"weight": 1.0}}
        path.unlink()
        path.with_name(CONTENTS).unlink()
        self.run(tiny_model_dir, tmp_path, loss_type="offset").train(resume_from_checkpoint=str(path.parent))


def test_batches_cut_by_one_process_are_refused_with_our_losses(tiny_model_dir, tmp_path):
    config = {"accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError, match="`dispatch_batches=True` has one process cut batches"):
        build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type="offset", **config)
    # TRL's own losses read nothing but the sequences
    theirs = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type="sigmoid", **config)
    theirs.train()
    assert theirs.state.global_step == theirs.args.max_steps
