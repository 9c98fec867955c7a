"""Averages of checkpoints."""

import json
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import trl_ext
from tests.helpers import build
from trl_ext import merging
from trl_ext.merging import MergeCheckpointsCallback, checkpoint_weights, merge_checkpoints


def checkpoint(folder, step, *logged):
    """A folder with the state of a trainer that logged these entries."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "global_step": step,
        "log_history": [entry if isinstance(entry, dict) else {"loss": entry} for entry in logged],
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_weights(tmp_path):
    folders = [checkpoint(tmp_path / f"{i}", i + 1, 0.1, loss) for i, loss in enumerate((0.5, 1.0))]
    assert checkpoint_weights(folders) == pytest.approx([2 / 3, 1 / 3])
    assert checkpoint_weights(folders, "loss", 2.0) == pytest.approx([0.8, 0.2])
    assert checkpoint_weights(folders, "step") == pytest.approx([1 / 3, 2 / 3])
    assert checkpoint_weights(folders, "step", 3.0) == pytest.approx([1 / 9, 8 / 9])
    assert checkpoint_weights(folders, "uniform", 7.0) == [0.5, 0.5]
    for by in ("loss", "step"):
        assert checkpoint_weights(folders, by, 0.0) == [0.5, 0.5]
    assert checkpoint_weights(folders, "loss", 5000.0) == [1.0, 0.0]
    assert checkpoint_weights([tmp_path], "uniform") == [1.0]


def test_the_last_evaluation_counts_where_there_is_any(tmp_path):
    """The losses are 3 and 1, so the weights are 1/4 and 3/4; any other choice of entries gives others."""
    folders = [
        checkpoint(
            tmp_path / "a",
            1,
            {"loss": 8.0},
            {"eval_loss": 5.0},
            {"eval_loss": 3.0},
            {"loss": 0.25},
            {"grad_norm": 9.0},
        ),
        checkpoint(tmp_path / "b", 2, {"eval_loss": 9.0}, {"eval_loss": 1.0}, {"loss": 0.5}),
    ]
    assert checkpoint_weights(folders) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("logged", "by", "penalty", "message"),
    [
        ((1.0,), "accuracy", 1.0, "choose 'loss', 'step' or 'uniform'"),
        ((1.0,), "loss", -0.5, r"`penalty=-0\.5` must be a number, at least 0"),
        ((1.0,), "loss", float("nan"), "`penalty=nan`"),
        ((1.0,), "loss", float("inf"), "`penalty=inf`"),
        ((1.0,), "loss", "1", "`penalty='1'`"),
        ((), "loss", 1.0, "logged no positive, finite loss"),
        ((0.0,), "loss", 1.0, "logged no positive, finite loss"),
        ((-1.0,), "loss", 1.0, "logged no positive, finite loss"),
        ((float("nan"),), "loss", 1.0, "logged no positive, finite loss"),
        ((float("inf"),), "loss", 1.0, "logged no positive, finite loss"),
    ],
)
def test_weights_that_cannot_be(logged, by, penalty, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoint_weights([checkpoint(tmp_path, 1, *logged)], by, penalty)


def test_checkpoints_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"has no trainer_state\.json, so its step"):
        checkpoint_weights([tmp_path], "step")
    with pytest.raises(ValueError, match="at least one checkpoint"):
        checkpoint_weights([])


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_callback_averages_what_the_run_saved(peft, tiny_model_dir, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    kwargs = {"callbacks": [MergeCheckpointsCallback(by="step")], "peft_config": config if peft else None}
    trainer = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, save_strategy="steps", save_steps=1,
                    max_steps=2, trainer_kwargs=kwargs)  # fmt: skip
    trainer.train()

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir if peft else folder)
        return PeftModel.from_pretrained(model, folder).merge_and_unload() if peft else model

    first, second, merged = (
        dict(load(tmp_path / name).named_parameters()) for name in ("checkpoint-1", "checkpoint-2", "merged")
    )
    for name, value in merged.items():
        torch.testing.assert_close(value, first[name] / 3 + 2 * second[name] / 3, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|eos|>"


@pytest.mark.parametrize(("last", "expected"), [(None, [2, 9, 10]), (2, [9, 10])])
def test_which_checkpoints_the_callback_takes(last, expected, tmp_path, monkeypatch):
    """The latest by number, not by name, and none of an earlier run in the same folder."""
    for name in (
        "checkpoint-10",
        "checkpoint-2",
        "checkpoint-9",
        "checkpoint-11",
        "checkpoint-best",
        "checkpoint-3-old",
    ):
        (tmp_path / name).mkdir()
    seen = []
    monkeypatch.setattr(merging, "merge_checkpoints", lambda *args, **options: seen.append((args, options)))
    callback = MergeCheckpointsCallback("step", 2.0, last)
    state = types.SimpleNamespace(is_world_process_zero=False, global_step=10)
    arguments = types.SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_end(arguments, state, None)
    assert not seen  # another process
    state.is_world_process_zero = True
    callback.on_train_end(arguments, state, None)
    folders = [tmp_path / f"checkpoint-{step}" for step in expected]
    assert seen == [((folders, tmp_path / "merged"), {"by": "step", "penalty": 2.0})]


@pytest.mark.parametrize("names", [[], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]], ids=len)
def test_what_cannot_be_merged_does_not_end_the_run(names, tiny_model_dir, tmp_path, caplog):
    """Fewer than two checkpoints, or two without a loss: a warning, and the run is finished as without the callback."""
    callback = MergeCheckpointsCallback()
    trainer = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, save_strategy="steps",
                    save_steps=1 if len(names) == 2 else 5, max_steps=len(names), logging_strategy="no",
                    trainer_kwargs={"callbacks": [callback]}) if names else None  # fmt: skip
    if trainer is None:
        state = types.SimpleNamespace(is_world_process_zero=True, global_step=10)
        callback.on_train_end(types.SimpleNamespace(output_dir=str(tmp_path)), state, None)
    else:
        assert trainer.train().global_step == len(names)
    said = "logged no positive" if len(names) == 2 else f"has {len(names)} of this run"
    assert f"The checkpoints were not merged: {tmp_path}" in caplog.text and said in caplog.text
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_strategy": "no"}, "nothing to merge with `save_strategy='no'`"),
        ({"save_strategy": "steps", "save_total_limit": 1}, "nothing to merge with `save_total_limit=1`"),
        ({"save_strategy": "steps", "save_total_limit": 2}, None),
        ({"save_strategy": "epoch"}, None),
        (
            {
                "save_strategy": "steps",
                "save_total_limit": 1,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 500,
            },
            None,
        ),
    ],
)
def test_what_is_known_when_the_trainer_is_built(options, message, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    callback = MergeCheckpointsCallback()
    for event in (callback.on_init_end, callback.on_train_begin):
        if message is None:
            event(arguments, None, None)
        else:
            with pytest.raises(ValueError, match=message):
                event(arguments, None, None)


@pytest.mark.parametrize("last", [1, 0, -2, True, 2.0])
def test_how_many_of_the_latest(last):
    with pytest.raises(ValueError, match="must be a whole number, at least 2"):
        MergeCheckpointsCallback(last=last)
    with pytest.raises(ValueError, match="choose 'loss'"):
        MergeCheckpointsCallback(by="accuracy")


def test_models_and_adapters_together_are_refused(tmp_path):
    model, adapter = checkpoint(tmp_path / "a", 1, 1.0), checkpoint(tmp_path / "b", 2, 1.0)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="some are models"):
        merge_checkpoints([model, adapter], tmp_path / "out")


def test_adapters_of_different_models_are_refused(tiny_model_dir, tmp_path):
    for name, base in (("a", tiny_model_dir), ("b", tmp_path / "other")):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(checkpoint(tmp_path / name, 1, 1.0))
    with pytest.raises(ValueError, match="belong to different models"):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_models_of_different_shapes_are_refused(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(checkpoint(tmp_path / "a", 1, 1.0))
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.config.layer_types = model.config.layer_types[:1]
    model.save_pretrained(checkpoint(tmp_path / "b", 2, 1.0))
    with pytest.raises(ValueError, match="different parameters"):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def constant_model(model_dir, folder, step, value, loss=1.0, dtype=torch.bfloat16):
    """A checkpoint of a model all of whose parameters are one number."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model.save_pretrained(checkpoint(folder, step, loss))
    return folder


@pytest.mark.parametrize(
    ("options", "weights", "expected"),
    [
        ({}, [1 / 7, 2 / 7, 4 / 7], 20.0),  # losses 4, 2, 1: (1 * 8 + 2 * 22 + 4 * 22) / 7
        ({"penalty": 2.0}, [1 / 21, 4 / 21, 16 / 21], 64 / 3),  # (1 * 8 + 4 * 22 + 16 * 22) / 21
        ({"by": "step"}, [1 / 6, 2 / 6, 3 / 6], 118 / 6),  # (1 * 8 + 2 * 22 + 3 * 22) / 6
        ({"by": "uniform", "penalty": 3.0}, [1 / 3, 1 / 3, 1 / 3], 52 / 3),
    ],
    ids=str,
)
def test_three_models_by_hand(options, weights, expected, tiny_model_dir, tmp_path):
    folders = [
        constant_model(tiny_model_dir, tmp_path / f"{step}", step, value, loss)
        for step, value, loss in ((1, 8.0, 4.0), (2, 22.0, 2.0), (3, 22.0, 1.0))
    ]
    # The tokenizer is that of the last checkpoint; the others here have none
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folders[-1])
    assert merge_checkpoints(folders, tmp_path / "out", **options) == pytest.approx(weights)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for value in merged.parameters():
        assert value.dtype == torch.bfloat16  # as the checkpoints are
        assert value.float().unique().tolist() == [pytest.approx(expected, rel=2**-8)]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|eos|>"


def test_a_last_checkpoint_without_a_tokenizer(tiny_model_dir, tmp_path):
    """The first one's has no say: the result then has none."""
    folders = [constant_model(tiny_model_dir, tmp_path / f"{step}", step, float(step)) for step in (1, 2)]
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folders[0])
    merge_checkpoints(folders, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def constant_adapter(model_dir, folder, step, a, b, base=torch.bfloat16):
    """A checkpoint of an adapter of rank 2 whose factors are `a` and `b` everywhere: an update of `2 a b`."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=base)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(a if "lora_A" in name else b)
    model.save_pretrained(checkpoint(folder, step, 1.0))
    return folder


@pytest.mark.parametrize(
    ("options", "rank", "update"),
    [
        # The average of the updates 2 * 1 * 1, 2 * 2 * 2 and 2 * 3 * 1, with weights 1/6, 2/6, 3/6
        ({}, 6, 36 / 6),
        # The factors with the square roots of the weights each: 2 * (sum of sqrt(w) a) * (sum of sqrt(w) b)
        (
            {"combination_type": "linear"},
            2,
            2 / 6 * (1 + 2 * 2**0.5 + 3 * 3**0.5) * (1 + 2 * 2**0.5 + 3**0.5),
        ),
    ],
    ids=["cat", "linear"],
)
def test_three_adapters_by_hand(options, rank, update, tiny_model_dir, tmp_path):
    folders = [
        constant_adapter(tiny_model_dir, tmp_path / f"{step}", step, a, b)
        for step, a, b in ((1, 1.0, 1.0), (2, 2.0, 2.0), (3, 3.0, 1.0))
    ]
    merge_checkpoints(folders, tmp_path / "out", by="step", **options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == []  # and no other adapter
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    before = base.model.layers[1].self_attn.q_proj.weight.detach().clone()
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    assert adapted.peft_config["default"].r == rank
    after = adapted.merge_and_unload().model.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(after - before, torch.full_like(before, update), rtol=1e-5, atol=1e-5)
