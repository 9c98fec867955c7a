"""Supervised fine-tuning with classes of rows: tags in the text, weights in the loss."""

import copy
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import AutoTokenizer

from tests.conftest import CHAT_TEMPLATE, preference_rows
from tests.helpers import assert_same_parameters, build, first_batch, history, loss_and_gradients, options, parameters
from trl_ext import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl_ext.trainers.sft import refuse_sharded_sequences


WEIGHTS = (1.0, 0.1, 0.0, 0.02, 0.3, 0.1, 1.0, 0.004)
READS = CHAT_TEMPLATE.replace(
    "'<|im_start|>' + message.role", "'<|im_start|>' + condition + ' ' + message.role"
).replace("'<|im_start|>assistant", "'<|im_start|>' + condition + ' assistant")


def rows(count: int = 8, **columns) -> list[dict]:
    """Prompts with completions of different lengths; a column is one value for all, or one for each row."""
    plain = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(count)]
    return [
        {**row, **{name: each[i % len(each)] if isinstance(each, tuple) else each for name, each in columns.items()}}
        for i, row in enumerate(plain)
    ]


def chats(count: int = 4, **columns) -> list[dict]:
    return [
        {
            **row,
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows(count, **columns)
    ]


def sft(model_dir, folder, data=None, *, cls=SFTTrainer, config=SFTConfig, stream=False, **overrides):
    data = Dataset.from_list(rows() if data is None else data)
    data = data.to_iterable_dataset() if stream else data
    return build(cls, config, model_dir, folder, dataset=data, **{"per_device_train_batch_size": 8, **overrides})


def templated(model_dir, template=READS):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = template
    return tokenizer


def built(model_dir, folder, data, template=READS, **overrides):
    """A trainer whose tokenizer has another chat template."""
    kwargs = {"processing_class": templated(model_dir, template), "train_dataset": Dataset.from_list(data)}
    return SFTTrainer(str(model_dir), SFTConfig(**options(folder, **overrides)), **kwargs)


def nll(trainer, batch) -> list[list[float]]:
    """Minus the log-probability of each trained token of each row, in float64 from full logits."""
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return [
        [-x for x in row[label != -100].tolist()] for row, label in zip(logps, batch["labels"][:, 1:], strict=True)
    ]


def expected(per_row: list[list[float]], weights, per_sequence: bool) -> float:
    if per_sequence:
        return sum(w * sum(row) / len(row) for w, row in zip(weights, per_row, strict=True)) / sum(weights)
    total = sum(w * len(row) for w, row in zip(weights, per_row, strict=True))
    return sum(w * sum(row) for w, row in zip(weights, per_row, strict=True)) / total


def test_without_classes_it_is_trls(tiny_model_dir, tmp_path):
    runs = [
        sft(tiny_model_dir, tmp_path, cls=cls, config=config, eval_strategy="steps", eval_steps=2)
        for cls, config in ((trl.SFTTrainer, trl.SFTConfig), (SFTTrainer, trl.SFTConfig), (SFTTrainer, SFTConfig))
    ]
    for run in runs:
        run.train()
        assert history(run) == history(runs[0])
        assert_same_parameters(parameters(run), parameters(runs[0]))
    assert "token_weights" not in first_batch(runs[2])


@pytest.mark.parametrize("weight", [1.0, 0.003])
def test_equal_weights_are_trls(weight, tiny_model_dir, tmp_path):
    """Also where the weights of a step add up to less than 1."""
    common = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    theirs = sft(tiny_model_dir, tmp_path, cls=trl.SFTTrainer, config=trl.SFTConfig, **common)
    ours = sft(tiny_model_dir, tmp_path, rows(weight=weight), **common)
    theirs.train(), ours.train()
    for a, b in zip(history(ours), history(theirs), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert len(history(ours)) == 6
    # Adam divides tiny gradients by themselves
    assert_same_parameters(parameters(ours), parameters(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_values(per_sequence, tiny_model_dir, tmp_path):
    trainer = sft(tiny_model_dir, tmp_path, rows(weight=WEIGHTS), per_sequence_loss=per_sequence)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    per_row = nll(trainer, batch)
    assert len({len(row) for row in per_row}) > 3, "rows differ in length"
    loss = expected(per_row, WEIGHTS, per_sequence)
    plain = expected(per_row, [1.0] * 8, False)
    assert abs(loss - plain) > 1e-2
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(loss, rel=1e-5)
    evaluated = trainer.evaluate()["eval_loss"]  # two batches of four, a mean each
    halves = [expected(per_row[i : i + 4], WEIGHTS[i : i + 4], per_sequence) for i in (0, 4)]
    assert evaluated == pytest.approx(sum(halves) / 2, rel=1e-5)
    trainer.train()
    assert history(trainer)[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("form", ["prompt and completion", "text"])
def test_rows_without_a_weight_column_per_sequence(form, tiny_model_dir, tmp_path):
    """Of text, whose first token nothing predicts, all others are trained."""
    texts = [{"text": row["prompt"] + row["completion"]} for row in rows()]
    trainer = sft(tiny_model_dir, tmp_path, texts if form == "text" else None, per_sequence_loss=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    assert loss == pytest.approx(expected(nll(trainer, batch), [1.0] * 8, True), rel=1e-5)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_micro_batches_add_up(per_sequence, tiny_model_dir, tmp_path):
    """The weights of a micro-batch do not add up to those of another, one of them to 0."""
    weights = (1.0, 0.1, 0.0, 0.0, 0.3, 0.1, 1.0, 0.004)
    runs = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = sft(
            tiny_model_dir, tmp_path, rows(weight=weights), per_device_train_batch_size=size, optim="sgd", max_steps=2,
            gradient_accumulation_steps=steps, learning_rate=0.1, max_grad_norm=0.0, per_sequence_loss=per_sequence,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    for run in runs[1:]:
        losses = [[entry["loss"] for entry in history(each)[:2]] for each in (run, runs[0])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert_same_parameters(parameters(run), parameters(runs[0]), rtol=1e-4, atol=1e-6)


def test_a_row_of_weight_0_teaches_nothing(tiny_model_dir, tmp_path):
    data = rows(2, weight=(1.0, 0.0))
    _, both = loss_and_gradients(trainer := sft(tiny_model_dir, tmp_path, data), first_batch(trainer))
    _, alone = loss_and_gradients(
        other := sft(tiny_model_dir, tmp_path, data[:1], cls=trl.SFTTrainer, config=trl.SFTConfig), first_batch(other)
    )
    for name in alone:
        torch.testing.assert_close(both[name], alone[name], rtol=1e-4, atol=1e-6)


def test_a_step_of_weight_0(tiny_model_dir, tmp_path, caplog):
    data = rows(4, weight=(1.0, 1.0, 0.0, 0.0))
    trainer = sft(tiny_model_dir, tmp_path, data, per_device_train_batch_size=1, optim="sgd", max_steps=1)
    batches = iter([trainer.data_collator([trainer.train_dataset[2]])])
    before = parameters(trainer)
    (batch,), count = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
    loss = trainer.training_step(trainer.model, batch, count)
    assert loss.item() == 0.0 and count > 0
    assert all(torch.all(p.grad == 0) for p in trainer.model.parameters() if p.grad is not None)
    assert "have the weight 0" in caplog.text
    evaluated = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[3]]))
    assert evaluated.item() == 0.0
    assert_same_parameters(parameters(trainer), before)


def test_the_tag_in_the_template(tiny_model_dir, tmp_path):
    data = chats(condition=("GPT4 Correct", "GPT3 Correct"))
    trainer = built(tiny_model_dir, tmp_path, data)
    tokenizer = trainer.processing_class
    for index, tag in enumerate(("GPT4 Correct", "GPT3 Correct")):
        row, said = trainer.train_dataset[index], data[index]
        question, answer = said["prompt"][0]["content"], said["completion"][0]["content"]
        prompt = f"<|im_start|>{tag} user\n{question}<|im_end|>\n<|im_start|>{tag} assistant\n"
        assert tokenizer.decode(row["input_ids"]) == prompt + answer + "<|im_end|>\n"
        trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert tokenizer.decode(trained) == answer + "<|im_end|>\n"
        # As it is generated from later
        later = tokenizer.apply_chat_template(
            said["prompt"], condition=tag, add_generation_prompt=True, tokenize=False
        )
        assert later == prompt
    assert set(trainer._signature_columns or ()) <= {"input_ids", "labels", "seq_lengths"}
    trainer.train()
    assert trainer.state.global_step == 3


def test_other_arguments_of_the_template_stay(tiny_model_dir, tmp_path):
    data = chats(2, condition="A", chat_template_kwargs={"enable_thinking": False})
    trainer = built(tiny_model_dir, tmp_path, data)
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert "<|im_start|>A assistant\n<think>\n\n</think>\n\n" in text


@pytest.mark.parametrize("form", ["prompt", "messages", "conversations"])
def test_the_tag_in_messages_of_the_user(form, tiny_model_dir, tmp_path):
    turns = ["hi", "hello", "\nwhy", "so"]
    keys = ("from", "value") if form == "conversations" else ("role", "content")
    messages = [dict(zip(keys, pair, strict=True)) for pair in zip(("user", "assistant") * 2, turns, strict=True)]
    row = {"prompt": messages[:3], "completion": messages[3:]} if form == "prompt" else {form: messages}
    data = [{**row, "condition": "Good:"}] * 2
    trainer = built(tiny_model_dir, tmp_path, data, CHAT_TEMPLATE, condition_in="user")
    written = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in zip(("user", "assistant") * 2, ["Good: hi", "hello", "Good:\nwhy", "so"], strict=True)
    )
    assert trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"]) == written


@pytest.mark.parametrize("tag, between", [("Good", " "), ("Good:\n", "")])
def test_the_tag_of_plain_text(tag, between, tiny_model_dir, tmp_path):
    trainer = sft(tiny_model_dir, tmp_path, rows(2, condition=tag))
    row, decode = trainer.train_dataset[0], trainer.processing_class.decode
    said = rows(1)[0]
    assert decode(row["input_ids"]) == f"{tag}{between}{said['prompt']}{said['completion']}<|eos|>"
    # Language modeling: the tag is read and not learnt
    texts = [{"text": f"it was {i} good", "condition": tag} for i in range(2)]
    row = sft(tiny_model_dir, tmp_path, texts).train_dataset[0]
    assert decode(row["input_ids"]) == f"{tag}{between}it was 0 good<|eos|>"
    trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert decode(trained) == f"{between}it was 0 good<|eos|>"


def test_a_template_that_does_not_read_the_tag(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"does not read the variable 'condition'.*condition_in='user'"):
        built(tiny_model_dir, tmp_path, chats(condition="A"), CHAT_TEMPLATE)


TAGGED, WEIGHED = {"condition": ("A", "B")}, {"weight": (1.0, 0.5)}
TOKENIZED = [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9], "condition": "A"}] * 2


@pytest.mark.parametrize(
    "data, overrides, message",
    [
        (rows(weight=(1.0, -0.5)), {}, "'weight' of the train dataset is negative .* in row 1: -0.5"),
        (rows(weight=(1.0, math.nan)), {}, "'weight' of the train dataset is not finite in row 1"),
        (rows(weight=(1.0, None)), {}, "'weight' of the train dataset has no value in row 1"),
        (rows(weight="1.0"), {}, "holds text, not a number"),
        (rows(weight=0.0), {}, "All weights of the train dataset are 0"),
        (rows(condition=("A", None)), {}, "'condition' of the train dataset holds None in row 1"),
        (rows(condition=("A", " ")), {}, "'condition' of the train dataset holds ' ' in row 1"),
        (rows(condition=1), {}, "'condition' of the train dataset holds 1 in row 0; expected the name of a class"),
        (TOKENIZED, {}, "The train dataset is tokenized and has a column 'condition'"),
        (rows(**TAGGED), {"condition_in": "user"}, "row 0 of the train dataset is plain text"),
        (rows(), {"condition_in": "user"}, "places the tags of the column 'condition', which the train dataset does not"),
        (rows(), {"condition_in": "text"}, r"`condition_in='text'` is none of \['template', 'user'\]"),
        (rows(**WEIGHED), {"packing": True}, "'weight' weighs .* excludes `packing`"),
        (rows(**WEIGHED), {"eval_packing": True}, "'weight' weighs .* excludes `packing`"),
        (rows(), {"per_sequence_loss": True, "loss_type": "dft"}, "`per_sequence_loss` weighs .* excludes `loss_type='dft'`"),
        (rows(**WEIGHED), {"label_smoothing_factor": 0.1}, "excludes `label_smoothing_factor`"),
        (rows(**WEIGHED), {"trainer_kwargs": {"data_collator": list}}, "excludes a `data_collator`"),
        (rows(**WEIGHED), {"trainer_kwargs": {"compute_loss_func": print}}, "excludes a `compute_loss_func`"),
        (rows(**TAGGED), {"trainer_kwargs": {"formatting_func": str}}, "`formatting_func` writes the whole text"),
        (rows(**TAGGED, image="x"), {}, "'condition' is read of text, and the train dataset has images"),
        (rows(**WEIGHED, image="x"), {}, "excludes images"),
        ([], {}, "The train dataset is empty"),
        (
            rows(**TAGGED, **WEIGHED), {"trainer_kwargs": {"eval_dataset": Dataset.from_list(rows(**TAGGED))}},
            "The train dataset has the column 'weight', and the eval dataset has not",
        ),
        (
            rows(**WEIGHED), {"trainer_kwargs": {"eval_dataset": {"test": Dataset.from_list(rows(**TAGGED, **WEIGHED))}}},
            "The test dataset has the column 'condition', and the train dataset has not",
        ),
    ],
)  # fmt: skip
def test_refused(data, overrides, message, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        sft(tiny_model_dir, tmp_path, data, **overrides)


def test_sequences_that_are_cut_among_devices():
    """Such a run takes several devices."""
    for given in ({"cp_enabled": True, "sp_enabled": False}, {"cp_enabled": False, "sp_enabled": True}):
        with pytest.raises(ValueError, match="under context or sequence parallelism"):
            refuse_sharded_sequences(SimpleNamespace(**given))
    refuse_sharded_sequences(SimpleNamespace(cp_enabled=False, sp_enabled=False))


def test_messages_without_a_place(tiny_model_dir, tmp_path):
    data = [{"messages": [{"role": "assistant", "content": "hi"}], "condition": "A"}]
    with pytest.raises(ValueError, match="The tag of row 0 of the train dataset has no place"):
        built(tiny_model_dir, tmp_path, data, CHAT_TEMPLATE, condition_in="user")


@pytest.mark.parametrize("bad", [{"weight": -1.0}, {"condition": None}])
def test_streams_are_checked_as_they_are_read(bad, tiny_model_dir, tmp_path):
    good = rows(6, **TAGGED, **WEIGHED)
    trained = sft(tiny_model_dir, tmp_path, good, stream=True, per_device_train_batch_size=2)
    plain = sft(tiny_model_dir, tmp_path, good, per_device_train_batch_size=2, shuffle_dataset=False)
    stream, whole = ([row["input_ids"] for row in each.train_dataset] for each in (trained, plain))
    assert stream == whole
    trained.train()
    assert trained.state.global_step == 3
    broken = sft(tiny_model_dir, tmp_path, [*good[:4], {**good[4], **bad}], stream=True, max_steps=2)
    with pytest.raises(ValueError, match=f"'{next(iter(bad))}' of the train dataset .* in row 4"):
        broken.train()


def test_evaluation_data(tiny_model_dir, tmp_path):
    data = Dataset.from_list(rows(**TAGGED, weight=WEIGHTS))
    trainer = sft(
        tiny_model_dir, tmp_path, list(data), trainer_kwargs={"eval_dataset": {"a": data, "b": data.select([0, 1])}}
    )
    logged = trainer.evaluate()
    fresh = trainer.evaluate(data.select([0, 1]))
    assert fresh["eval_loss"] == pytest.approx(logged["eval_b_loss"], rel=1e-6)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(logged["eval_a_loss"], rel=1e-6)
    with pytest.raises(ValueError, match="The train dataset has the column 'condition', and the eval dataset has not"):
        trainer.evaluate(data.remove_columns("condition"))


def test_resume(tiny_model_dir, tmp_path):
    def run(folder, **resumed):
        trainer = sft(
            tiny_model_dir, folder, rows(12, **TAGGED, weight=WEIGHTS), per_device_train_batch_size=2, max_steps=4,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(**resumed)
        return trainer

    whole = run(tmp_path)
    again = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_parameters(parameters(again), parameters(whole))
    losses = [[entry["loss"] for entry in history(each) if "loss" in entry] for each in (again, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert "C-RLFT" in (tmp_path / "README.md").read_text()


def test_rows_without_padding(tiny_model_dir, tmp_path):
    """One row of tokens, as `padding_free` makes it, has the loss of padded rows."""
    data = rows(**TAGGED, weight=WEIGHTS)
    losses = []
    for padding_free in (False, True):
        for per_sequence in (False, True):
            trainer = sft(
                tiny_model_dir,
                tmp_path,
                data,
                padding_free=padding_free,
                max_length=None,
                per_sequence_loss=per_sequence,
            )
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
            assert len(batch["input_ids"]) == (1 if padding_free else 8)
            losses.append(trainer.compute_loss(trainer.model.eval(), batch).item())
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-4) and abs(losses[0] - losses[1]) > 1e-3


def test_virtual_tokens_of_an_adapter(tiny_model_dir, tmp_path):
    """They stand before the row, and have no weight."""
    adapter = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    losses = []
    for cls, config, data in ((trl.SFTTrainer, trl.SFTConfig, rows()), (SFTTrainer, SFTConfig, rows(weight=0.5))):
        torch.manual_seed(0)
        trainer = sft(tiny_model_dir, tmp_path, data, cls=cls, config=config, trainer_kwargs={"peft_config": adapter})
        trainer.train()
        losses.append([entry["loss"] for entry in history(trainer)[:3]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("stage", [(trl.SFTTrainer, trl.SFTConfig), (DPOTrainer, DPOConfig)])
def test_a_copy_of_the_model_of_an_earlier_stage(stage, tiny_model_dir, tmp_path):
    """TRL's fused forward is copied with the model, and would run the weights of the one that it was copied from."""
    data = Dataset.from_list(rows() if stage[0] is trl.SFTTrainer else preference_rows())
    first = build(*stage, tiny_model_dir, tmp_path, dataset=data)
    copied = copy.deepcopy(first.model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(1.5)
    data = Dataset.from_list(rows(weight=WEIGHTS))
    second = SFTTrainer(copied, SFTConfig(**options(tmp_path)), train_dataset=data)
    batch = second.data_collator([second.train_dataset[i] for i in range(8)])
    loss = second.compute_loss(second.model.eval(), dict(batch)).item()
    assert loss == pytest.approx(expected(nll(second, batch), WEIGHTS, False), rel=1e-5)


def test_the_template_of_the_example(tiny_model_dir, tmp_path):
    """The tag before each role; what is trained are the assistant's words; the best class where no other is given."""
    script = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "c_rlft.py"))
    messages = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant", "user", "assistant")]
    data = [{"messages": messages, "condition": tag} for tag in ("Good", "Poor")]
    template = script["CHAT_TEMPLATE"].replace("__BEST__", "Good")
    trainer = built(tiny_model_dir, tmp_path, data, template, assistant_only_loss=True)
    tokenizer, row = trainer.processing_class, trainer.train_dataset[1]
    turn = "Poor User: u<|eos|>Poor Assistant: a<|eos|>"
    assert tokenizer.decode(row["input_ids"]) == "System: s<|eos|>" + 2 * turn
    trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == 2 * " a<|eos|>"
    asked = tokenizer.apply_chat_template(messages[1:2], add_generation_prompt=True, tokenize=False)
    assert asked == "Good User: u<|eos|>Good Assistant:"


def test_pairs_as_classes():
    classes = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "c_rlft.py"))["classes"]
    pairs = {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"], "score_chosen": [1, 2]}
    good, poor = {"condition": "Good", "weight": 1.0}, {"condition": "Poor", "weight": 0.1}
    assert list(classes(Dataset.from_dict(pairs))) == [
        {"prompt": "p", "completion": "a", **good}, {"prompt": "q", "completion": "b", **good},
        {"prompt": "p", "completion": "c", **poor}, {"prompt": "q", "completion": "d", **poor},
    ]  # fmt: skip
    whole = {side: [[{"role": "user", "content": side}]] for side in ("chosen", "rejected")}
    assert [row["messages"][0]["content"] for row in classes(Dataset.from_dict(whole))] == ["chosen", "rejected"]
