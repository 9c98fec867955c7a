"""Which head runs where, models that are used twice, and what is measured when."""

import copy
import logging
import os
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch, history, loss_and_gradients
from trl_ext.logprobs import Head
from trl_ext.trainers import scoring
from trl_ext.trainers.scoring import Scorer
from trl_ext.trainers.trl_seam import fused_forward


def ours(tiny_model_dir, tmp_path, **kwargs):
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **kwargs)


# Backends


def test_auto_on_a_cpu_is_torch(tiny_model_dir, tmp_path):
    assert ours(tiny_model_dir, tmp_path)._scorer.head.backend == "torch"


def test_auto_leaves_wpo_to_trl(tiny_model_dir, tmp_path):
    assert ours(tiny_model_dir, tmp_path, use_weighting=True)._scorer is None


def test_liger_needs_a_gpu(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="its Triton kernels need a GPU"):
        ours(tiny_model_dir, tmp_path, logprob_backend="liger")


def test_liger_of_an_old_version(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring.importlib.metadata, "version", lambda name: "0.8.1")
    with pytest.raises(ValueError, match=r"liger-kernel 0.8.1 is older than 0.8.2 \(wrong gradients\)"):
        ours(tiny_model_dir, tmp_path, logprob_backend="liger")


def test_wpo_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="use_weighting"):
        ours(tiny_model_dir, tmp_path, logprob_backend="torch", use_weighting=True)


def test_an_adapter_on_the_head_is_refused(tiny_model_dir, tmp_path):
    peft = {"peft_config": LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")}
    with pytest.raises(ValueError, match="lm_head"):
        ours(tiny_model_dir, tmp_path, trainer_kwargs=peft)


# Shared prompts


def test_prompt_learning_does_not_share(tiny_model_dir, tmp_path, caplog):
    peft = {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}
    kwargs = {"trainer_kwargs": peft, "optim": "sgd", "gradient_checkpointing": False}
    with caplog.at_level(logging.WARNING):
        trainer = ours(tiny_model_dir, tmp_path, **kwargs)
    assert not trainer._scorer.share_prefix
    assert "the adapter learns a prompt" in caplog.text
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, **kwargs)
    torch.manual_seed(0)
    values = torch.randn(3, 32)
    batch = first_batch(trainer)
    results = []
    for each in (theirs, trainer):
        with torch.no_grad():
            each.model.prompt_encoder["default"].embedding.weight.copy_(values)
        results.append(loss_and_gradients(each, batch))
    (loss, grads), (our_loss, our_grads) = results
    torch.testing.assert_close(our_loss, loss)
    for name in grads:
        torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"share_prefix=True.* the adapter learns a prompt"):
        ours(tiny_model_dir, tmp_path, share_prefix=True, **kwargs)


def test_dropout_is_not_shared(tiny_model_dir, tmp_path):
    peft = {"peft_config": LoraConfig(r=2, lora_dropout=0.1, task_type="CAUSAL_LM")}
    assert ours(tiny_model_dir, tmp_path, trainer_kwargs=peft)._scorer.share_prefix  # TRL turns dropout off
    with pytest.raises(ValueError, match="dropout is on"):
        ours(tiny_model_dir, tmp_path, trainer_kwargs=peft, disable_dropout=False, share_prefix=True)


@pytest.mark.parametrize("loss_type", ["sigmoid", "bias_variance", ["offset", "sft"]])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_are_those_of_plain_rows(loss_type, peft, tiny_model_dir, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    results = []
    for options in ({"logprob_backend": "trl"}, {"share_prefix": True}, {"share_prefix": False}):
        torch.manual_seed(0)
        trainer = ours(
            tiny_model_dir,
            tmp_path,
            loss_type=loss_type,
            trainer_kwargs={"peft_config": config} if peft else {},
            **options,
        )
        results.append(loss_and_gradients(trainer, first_batch(trainer)))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        assert grads.keys() == results[0][1].keys()
        for name, value in results[0][1].items():
            scale = value.abs().max() + 1e-6
            torch.testing.assert_close(grads[name] / scale, value / scale, rtol=1e-4, atol=2e-5)


def test_four_completions_of_one_prompt_share_it(tiny_model_dir, tmp_path):
    trainer = ours(tiny_model_dir, tmp_path, share_prefix=True)
    inputs = first_batch(trainer)
    joint = trainer._join(inputs, inputs)
    four, two = trainer._scorer.layout(joint, 4), trainer._scorer.layout(joint, 8)
    assert (four.groups >= 0).sum() < (two.groups >= 0).sum()


def test_moe_with_its_auxiliary_loss(tmp_path):
    from tests.logprobs.families import EXACT, tiny

    results = []
    for aux, backend in ((True, "trl"), (True, "auto"), (False, "auto")):
        model = tiny("qwen3_moe", {**EXACT["qwen3_moe"], "vocab_size": 600})
        trainer = moe_trainer(model, tmp_path, backend, 0.1 if aux else 0.0)
        assert trainer.aux_loss_enabled is aux
        if backend == "auto":
            assert trainer._scorer.share_prefix is not aux
        results.append(loss_and_gradients(trainer, first_batch(trainer)))
    (theirs, grads), (loss, our_grads), _ = results
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    for name in grads:
        torch.testing.assert_close(our_grads[name], grads[name], rtol=1e-3, atol=1e-5)


def test_the_auxiliary_loss_is_added_once_in_a_mix(tmp_path):
    """Whatever the number of TRL's losses beside ours, and whatever their weights."""
    from tests.logprobs.families import EXACT, tiny

    losses = {}
    names = ("sigmoid", "sft", "length_regularized")
    for loss_type in (*names, list(names)):
        for coefficient in (0.0, 0.5):
            model = tiny("qwen3_moe", {**EXACT["qwen3_moe"], "vocab_size": 600})
            weights = {"loss_weights": [0.5, 2.0, 3.0]} if isinstance(loss_type, list) else {}
            trainer = moe_trainer(model, tmp_path, "auto", coefficient, loss_type=loss_type, **weights)
            loss, _ = loss_and_gradients(trainer, first_batch(trainer))
            losses[str(loss_type), coefficient] = loss.item()
    auxiliary = losses["sigmoid", 0.5] - losses["sigmoid", 0.0]
    assert auxiliary > 0.1
    expected = sum(w * losses[name, 0.0] for w, name in zip((0.5, 2.0, 3.0), names, strict=True))
    assert losses[str(list(names)), 0.0] == pytest.approx(expected, rel=1e-5)
    assert losses[str(list(names)), 0.5] == pytest.approx(expected + auxiliary, rel=1e-5)
    assert trainer._metrics["train"]["loss/sigmoid"] == [pytest.approx(losses["sigmoid", 0.0], rel=1e-5)]
    assert len(trainer._metrics["train"]["aux_loss"]) == 1


def moe_trainer(model, tmp_path, backend, coefficient, **overrides):
    from tests.conftest import build_tokenizer
    from tests.helpers import options

    return trl_ext.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl_ext.DPOConfig(
            **options(tmp_path, logprob_backend=backend, router_aux_loss_coef=coefficient, **overrides)
        ),
        processing_class=build_tokenizer(),
        train_dataset=Dataset.from_list(preference_rows(4)),
    )


# One model, twice


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


# What is measured when


def test_entropy_is_that_of_logged_steps(tiny_model_dir, tmp_path):
    kwargs = {"optim": "sgd", "max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    every = history_of(ours(tiny_model_dir, tmp_path, logging_steps=1, **kwargs))
    second = history_of(ours(tiny_model_dir, tmp_path, logging_steps=2, **kwargs))
    assert [entry["entropy"] for entry in second] == pytest.approx(
        [every[1]["entropy"], every[3]["entropy"]], rel=1e-5
    )
    # the others are means over all steps, as TRL's are
    means = [(every[i]["mean_token_accuracy"] + every[i + 1]["mean_token_accuracy"]) / 2 for i in (0, 2)]
    assert [entry["mean_token_accuracy"] for entry in second] == pytest.approx(means, abs=1e-6)


def history_of(trainer):
    trainer.train()
    return [entry for entry in history(trainer) if "loss" in entry]


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_logging_strategies(strategy, tiny_model_dir, tmp_path):
    trainer = ours(tiny_model_dir, tmp_path, logging_strategy=strategy, logging_first_step=True)
    trainer.train()
    trainer.evaluate()
    entries = history(trainer)
    assert "entropy" in entries[0]
    assert all("eval_entropy" in entry for entry in entries if "eval_loss" in entry)


@pytest.mark.gpu
def test_auto_on_a_gpu_is_liger(tiny_model_dir, tmp_path):
    trainer = ours(tiny_model_dir, tmp_path, use_cpu=False)
    assert trainer._scorer.head.backend == "liger"
    assert os.environ.get("TRITON_INTERPRET") != "1"
    trainer.train()
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, use_cpu=False)
    theirs.train()
    assert history(trainer)[0]["loss"] == pytest.approx(history(theirs)[0]["loss"], rel=1e-3)


# A reference model of another kind


def test_a_reference_that_cannot_share_prompts(tiny_model_dir, tmp_path, caplog):
    """The reference reads the same batches, so a recurrent one keeps both models on plain rows."""
    from tests.logprobs.families import INEXACT, tiny

    def reference():
        return tiny("mamba", {**INEXACT["mamba"][0], "vocab_size": 400})

    with caplog.at_level(logging.WARNING):
        trainer = ours(tiny_model_dir, tmp_path, loss_type="offset", trainer_kwargs={"ref_model": reference()})
    assert not trainer._scorer.share_prefix
    assert "of the reference model, it has layers of type" in caplog.text
    batch = first_batch(trainer)
    loss, _ = loss_and_gradients(trainer, batch)
    theirs = ours(
        tiny_model_dir, tmp_path, loss_type="offset", logprob_backend="trl", trainer_kwargs={"ref_model": reference()}
    )
    torch.testing.assert_close(loss, loss_and_gradients(theirs, batch)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"share_prefix=True.* of the reference model"):
        ours(tiny_model_dir, tmp_path, share_prefix=True, trainer_kwargs={"ref_model": reference()})


# By hand


def wanted(device="cpu", **kwargs):
    """What a config says of log-probabilities; without fields, as TRL's own class."""
    return SimpleNamespace(device=SimpleNamespace(type=device), torch_compile=False, n_gpu=1, **kwargs)


@pytest.mark.parametrize("version", ["0.8.2", "0.8.1", None])
def test_what_auto_stands_for(version, monkeypatch):
    def installed(name):
        assert name == "liger-kernel"
        if version is None:
            raise scoring.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(scoring.importlib.metadata, "version", installed)
    fastest = "liger" if version == "0.8.2" else "torch"
    for fields in ({}, {"logprob_backend": "auto"}, {"logprob_backend": "auto", "use_weighting": False}):
        backends = [scoring.resolve_backend(wanted(device, **fields)) for device in ("cuda", "xpu", "cpu", "mps")]
        assert backends == [fastest, fastest, "torch", "torch"]
    assert scoring.resolve_backend(wanted("cuda", use_weighting=True)) == "trl"
    assert scoring.resolve_backend(wanted("cuda", use_weighting=True, logprob_backend="trl")) == "trl"
    assert scoring.resolve_backend(wanted("cuda", logprob_backend="torch")) == "torch"
    liger = {"logprob_backend": "liger"}
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        for device in ("cuda", "cpu"):
            if fastest == "liger" and (device == "cuda" or interpreted == "1"):
                assert scoring.resolve_backend(wanted(device, **liger)) == "liger"
                continue
            reason = {"0.8.2": "need a GPU", "0.8.1": "is older than 0.8.2", None: "is not installed"}[version]
            with pytest.raises(ValueError, match=f"`logprob_backend='liger'` cannot run: .*{reason}"):
                scoring.resolve_backend(wanted(device, **liger))


@pytest.mark.parametrize(
    ("fields", "aux_loss", "reason"),
    [
        ({}, False, None),
        ({"torch_compile": True}, False, "the model is compiled"),
        ({"n_gpu": 2}, False, "`DataParallel` splits batches by row"),
        ({}, True, "the auxiliary loss of a mixture of experts counts tokens"),
    ],
)
def test_when_prompts_are_shared(fields, aux_loss, reason, tiny_model_dir, caplog, monkeypatch):
    enabled = []
    monkeypatch.setattr(scoring, "enable_block_masks", lambda: enabled.append(1))
    PartialState()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)

    def built(device="cpu", **kwargs):
        args = wanted(device, logprob_backend="torch", logprob_memory_mb=3.0, **kwargs)
        vars(args).update(fields)
        caplog.clear()
        return scoring.build_scorer(model, args, aux_loss), "do not share the row" in caplog.text

    for options in ({}, {"share_prefix": "auto"}):
        scorer, warned = built(**options)
        assert scorer.share_prefix is (reason is None) and scorer.always is False and warned is (reason is not None)
        assert (scorer.head.backend, scorer.head.memory_mb, scorer.hidden_size) == ("torch", 3.0, 32)
    scorer, warned = built(share_prefix=False)
    assert scorer.share_prefix is False and scorer.always is False and not warned
    if reason is None:
        scorer, warned = built(share_prefix=True)
        assert scorer.share_prefix is scorer.always is True and not warned
    else:
        with pytest.raises(ValueError, match=f"would not be exact for this model: {reason}"):
            built(share_prefix=True)
    assert not enabled
    built("cuda", share_prefix=False)
    assert not enabled
    built("cuda")
    assert len(enabled) == (reason is None)


def test_batches_that_cannot_share_their_prompts():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 3]])
    completion = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    left = {**inputs, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    more = {**inputs, "token_type_ids": torch.zeros_like(ids), "ref_chosen_logps": torch.zeros(1)}
    head = Head("torch")
    auto, always = Scorer(head, True, False, 32), Scorer(head, True, True, 32)
    assert Scorer(head, False, False, 32).layout(inputs, 1) is None
    # The first token once; then the prompt's last token and the first of the completion, of each of the two
    for scorer in (auto, always):
        assert scorer.layout(inputs, 1).tokens.shape == (1, 5)
    assert auto.layout(left, 1) is None and auto.layout(more, 1) is None
    with pytest.raises(ValueError, match="cannot share prompts: it is not padded on the right"):
        always.layout(left, 1)
    with pytest.raises(ValueError, match=r"cannot share prompts: the model is given \['token_type_ids'\] too"):
        always.layout(more, 1)


def test_shared_rows_that_cost_more():
    """A prompt of one token and completions of ten: one row of 20 tokens, whose attention costs more than it saves."""
    ids = torch.arange(22).view(2, 11) + 5
    ids[1, 0] = ids[0, 0]
    completion = torch.ones_like(ids)
    completion[:, 0] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    head = Head("torch")
    # 20 (6 H + 20) < 22 (6 H + 11) where 12 H > 158: at H = 14, not at H = 13
    assert Scorer(head, True, False, 13).layout(inputs, 1) is None
    assert Scorer(head, True, False, 14).layout(inputs, 1).tokens.shape == (1, 20)
    assert Scorer(head, True, True, 1).layout(inputs, 1).tokens.shape == (1, 20)
