"""What a config or a trainer is given reaches the place where it is used."""

from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch, options
from trl_ext.losses import get_loss
from trl_ext.trainers import arguments, reference
from trl_ext.trainers.dpo import DPOTrainer
from trl_ext.trainers.reference import copies_policy
from trl_ext.trainers.with_scores import with_scores


# Of the command line


def test_what_a_config_says_without_a_gpu():
    """transformers speaks of `bf16/gpu`; the way out is named instead. Other messages are kept."""
    text = arguments.explained(ValueError("Your setup doesn't support bf16/gpu."))
    assert text.startswith("there is no GPU that computes in bfloat16") and "--use_cpu --bf16 false" in text
    assert arguments.explained(ValueError("something else")) == "something else"


def test_liger_needs_a_gpu_and_liger(monkeypatch):
    found = {"liger_kernel": True}
    monkeypatch.setattr(arguments.importlib.util, "find_spec", found.get)
    for cuda, xpu in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(arguments.torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(arguments, "is_xpu_available", lambda xpu=xpu: xpu)
        if cuda or xpu:
            arguments.refuse_liger_without_gpu(False)
        for use_cpu in (True, False)[: 1 if cuda or xpu else 2]:
            with pytest.raises(ValueError, match="needs a GPU, and this run is on a CPU"):
                arguments.refuse_liger_without_gpu(use_cpu)
    found.clear()
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        arguments.refuse_liger_without_gpu(False)


# Of the trainer


def test_what_is_handed_on_to_trl(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    compute_metrics = lambda prediction: {}  # noqa: E731
    data = Dataset.from_list(preference_rows(4))
    trainer = DPOTrainer(
        model=model,
        args=trl_ext.DPOConfig(**options(tmp_path, loss_type="offset")),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        compute_metrics=compute_metrics,
        optimizers=(optimizer, scheduler),
    )
    assert trainer.model is model and trainer.compute_metrics is compute_metrics
    assert trainer.optimizer is optimizer and trainer.lr_scheduler is scheduler
    assert trainer.eval_dataset is None


class Stop(Exception):
    pass


def test_all_arguments_are_handed_on_to_trl(tiny_model_dir, tmp_path, monkeypatch):
    seen = {}

    def init(self, **kwargs):
        seen.update(kwargs)
        raise Stop

    monkeypatch.setattr(trl.DPOTrainer, "__init__", init)
    names = ("data_collator", "compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config")
    given = {name: object() for name in (*names, "processing_class")}
    args, data = trl_ext.DPOConfig(**options(tmp_path)), Dataset.from_list(preference_rows(2))
    given_reference = torch.nn.Identity()
    with pytest.raises(Stop):
        DPOTrainer(str(tiny_model_dir), given_reference, args, train_dataset=data, eval_dataset={"a": data}, **given)
    assert {name: seen[name] for name in given} == given
    assert (seen["model"], seen["ref_model"], seen["args"]) == (str(tiny_model_dir), given_reference, args)
    assert seen["train_dataset"][:] == seen["eval_dataset"]["a"][:] == data[:] and len(seen) == 12


def test_a_mix_gives_back_the_outputs_of_trl(tiny_model_dir, tmp_path):
    for loss_type in (["sigmoid", "sft", "offset"], ["offset"], ["sigmoid", "hinge"]):
        trainer = build(DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type)
        trainer.model.eval()
        batch = first_batch(trainer)
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        plain = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        torch.testing.assert_close(outputs.logits, plain.logits)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), loss)


@pytest.mark.parametrize("zero3", [False, True])
@pytest.mark.parametrize(
    ("options", "environment", "copies"),
    [
        (None, None, True),
        ({"precompute_ref_log_probs": False, "fsdp": []}, None, True),
        ({"precompute_ref_log_probs": True, "fsdp": []}, None, False),
        ({"precompute_ref_log_probs": True, "fsdp": []}, "false", False),
        ({"precompute_ref_log_probs": True, "fsdp": []}, "True", True),
        ({"precompute_ref_log_probs": True, "fsdp": ["full_shard"]}, None, True),
    ],
)
def test_when_the_reference_is_a_copy(options, environment, copies, zero3, tiny_model_dir, monkeypatch):
    """Not of a name, of adapters or under ZeRO-3; where it is precomputed, under FSDP alone."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if environment is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", environment)
    monkeypatch.setattr(reference, "is_deepspeed_zero3_enabled", lambda: zero3)
    args = None if options is None else SimpleNamespace(**options)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert copies_policy(model, None, args) is (copies and not zero3)
    assert copies_policy(model, object(), args) is False
    assert copies_policy(str(tiny_model_dir), None, args) is False


# Scores that a reward gives


def lengths(prompts, completions, **kwargs):
    return [float(len(text)) for text in completions]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))


def pairs(**columns):
    row = {"prompt": "p", "chosen": " four", "rejected": " no"}
    return Dataset.from_list([{**row, **columns}])


OFFSET = {"sigmoid": get_loss("length_regularized"), "offset": get_loss("offset")}


def test_what_has_no_scores_is_scored(cache):
    (row,) = with_scores(pairs(), lengths, None, OFFSET)
    assert (row["score_chosen"], row["score_rejected"]) == (5.0, 3.0)
    for there in ({"score_chosen": 1.0, "score_rejected": 0.0}, {"preference_prob": 0.5}, {"scores": [1.0]}):
        data = pairs(**there)
        assert with_scores(data, lengths, None, OFFSET) is data
    assert with_scores(None, lengths, None, OFFSET) is None


def test_each_of_several_datasets_is_scored(cache):
    given = {"a": pairs(), "b": pairs(score_chosen=1.0, score_rejected=0.0), "c": None}
    found = with_scores(given, lengths, None, OFFSET)
    assert list(found) == ["a", "b", "c"] and found["c"] is None
    assert found["a"]["score_chosen"][:] == [5.0] and found["b"]["score_chosen"][:] == [1.0]


@pytest.mark.parametrize("loss", ["margin_adaptive", "anchored", "sppo_soft"])
def test_losses_that_read_scores_take_a_reward(loss, cache):
    assert "score_rejected" in with_scores(pairs(), lengths, None, {loss: get_loss(loss)}).column_names


def test_a_reward_that_would_not_be_used(cache):
    with pytest.raises(ValueError, match=r"none of the losses \['length_regularized'\] reads scores"):
        with_scores(pairs(), lengths, None, {"length_regularized": get_loss("length_regularized")})
    with pytest.raises(ValueError, match="none of the losses of TRL reads scores"):
        with_scores(None, lengths, None, {})
    with pytest.raises(ValueError, match="map-style datasets"):
        with_scores(pairs().to_iterable_dataset(), lengths, None, OFFSET)


def test_rewards_and_a_judge_are_refused_where_scores_are_there_too(cache):
    scored = with_scores(pairs(), lengths, None, OFFSET)
    with pytest.raises(ValueError, match="What scores is `reward_funcs` or a `judge`; got both"):
        with_scores(scored, lengths, lambda prompts, first, second: [1.0] * len(first), OFFSET)
    with pytest.raises(ValueError, match="is no judge of two"):
        with_scores(scored, None, 3, OFFSET)


def test_a_judge_whose_answers_a_loss_cannot_use_is_not_asked(cache):
    def judge(prompts, first, second):
        raise AssertionError("it was asked")

    with pytest.raises(
        ValueError, match=r"\['offset'\] require scores, and a `judge` gives the pairs of the eval dataset"
    ):
        with_scores(pairs(), None, judge, OFFSET)


def test_a_judge_gives_probabilities(cache):
    def longer(prompts, first, second):
        return [0.75 if len(a) > len(b) else 0.25 for a, b in zip(first, second, strict=True)]

    data = Dataset.from_list(
        [{"prompt": "p", "chosen": "abc", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": "abc"}]
    )
    found = with_scores(data, None, longer, {"anchored": get_loss("anchored")})
    assert found["preference_prob"][:] == [0.75, 0.25] and "score_chosen" not in found.column_names


def test_a_trainer_scores_training_and_evaluation_data(cache, tiny_model_dir, tmp_path):
    data = Dataset.from_list(
        [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in preference_rows(6)]
    )
    trainer = build(
        DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=data, loss_type="margin_adaptive",
        trainer_kwargs={"reward_funcs": lengths, "eval_dataset": {"a": data, "b": data.select([0])}},
    )  # fmt: skip
    assert trainer.train_dataset["score_chosen"][:] == [float(len(text)) for text in data["chosen"]]
    assert trainer.eval_dataset["b"]["score_rejected"][:] == [float(len(data["rejected"][0]))]


# What is measured when


# What a model card says
