"""Prompts that completions share in the trainer: where that is exact, and that it changes no number."""

import contextlib
import copy
import logging

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch, history, loss_and_gradients, masked_rows
from trl_ext.rows import from_batch


def ours(tiny_model_dir, tmp_path, **kwargs):
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **kwargs)


def test_prompt_learning_does_not_share(tiny_model_dir, tmp_path, caplog):
    peft = {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}
    kwargs = {"trainer_kwargs": peft, "optim": "sgd", "gradient_checkpointing": False}
    with caplog.at_level(logging.WARNING):
        trainer = ours(tiny_model_dir, tmp_path, **kwargs)
    assert trainer._scorer.sharing is None
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
    assert ours(tiny_model_dir, tmp_path, trainer_kwargs=peft)._scorer.sharing is not None  # TRL turns dropout off
    with pytest.raises(ValueError, match="dropout is on"):
        ours(tiny_model_dir, tmp_path, trainer_kwargs=peft, disable_dropout=False, share_prefix=True)


@pytest.mark.parametrize("loss_type", ["sigmoid", "bias_variance", ["offset", "sft"]])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_are_those_of_plain_rows(loss_type, peft, tiny_model_dir, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    results = []
    runs = [{"logprob_backend": "trl"}, {"share_prefix": True}, {"share_prefix": False}, {"share_prefix": True}]
    for options, rows in zip(runs, [contextlib.nullcontext] * 3 + [masked_rows], strict=True):
        torch.manual_seed(0)
        with rows():
            trainer = ours(
                tiny_model_dir,
                tmp_path,
                loss_type=loss_type,
                trainer_kwargs={"peft_config": config} if peft else {},
                **options,
            )
            results.append(loss_and_gradients(trainer, first_batch(trainer)))
            sharing = trainer._scorer.sharing
            assert (sharing is not None) is (options.get("share_prefix") is True)
            assert sharing is None or sharing.unpadded is (rows is contextlib.nullcontext)
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        assert grads.keys() == results[0][1].keys()
        for name, value in results[0][1].items():
            scale = value.abs().max() + 1e-6
            torch.testing.assert_close(grads[name] / scale, value / scale, rtol=1e-4, atol=2e-5)


def test_four_completions_of_one_prompt_share_it(tiny_model_dir, tmp_path):
    words = [" good", " bad film", " slow sad film", " very long sad film"]
    data = [
        {"prompt": f"what a{' long' * n} story", "completions": words, "scores": [0.0, 1.0, 2.0, 3.0]}
        for n in range(4)
    ]
    trainer = ours(tiny_model_dir, tmp_path, dataset=Dataset.from_list(data), loss_type="anchored", share_prefix=True)
    rows, _ = from_batch(first_batch(trainer))
    tokens = lambda text: len(trainer.processing_class(text)["input_ids"])  # noqa: E731
    # The prompt without its last token, once; that token and the completion without its last (the end) for each of the four
    slots = sum(tokens(row["prompt"]) - 1 + sum(tokens(text) + 1 for text in words) for row in data)
    assert (rows.layout.groups >= 0).sum() == slots


def test_unpadded_rows_reach_the_model(tiny_model_dir, tmp_path):
    """From the workers, in evaluation and in training, for policy and reference: one row of as many tokens as there are."""
    options = {"max_steps": 2, "dataloader_num_workers": 1, "gradient_checkpointing": True}
    trainer = ours(tiny_model_dir, tmp_path, loss_type="offset", share_prefix=True, **options)
    shapes = []
    for model in (trainer.model, trainer.ref_model):
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    rows, _ = from_batch(first_batch(trainer))
    tokens = (rows.layout.groups >= 0).sum().item()
    assert rows.layout.tokens.shape == (1, tokens) and tokens < rows.inputs["attention_mask"].sum()
    trainer.evaluate()
    trainer.train()
    # Plain rows are those that the first batch is compared with: two per model without gradients, two with
    assert sum(shape[0] != 1 for shape in shapes) == 6 and sum(shape[0] == 1 for shape in shapes) > 10


@pytest.mark.parametrize(
    "options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str
)
def test_float32_weights_attend_in_half_precision(options, tiny_model_dir, tmp_path, monkeypatch):
    """As the kernel needs it: under autocast in training, evaluation beside it, the reference and the first batch's check."""
    from trl_ext.logprobs import varlen

    seen, attend = [], varlen.attend
    monkeypatch.setattr(varlen, "attend", lambda query, *rest: seen.append(query.dtype) or attend(query, *rest))
    trainer = ours(tiny_model_dir, tmp_path, loss_type="offset", bf16=True, share_prefix=True, max_steps=2, **options)
    assert trainer.model.dtype == torch.float32
    trainer.train()
    trainer.evaluate()
    assert len(seen) > 20 and set(seen) == {torch.bfloat16}
    # Before a training, transformers evaluates a model without autocast: that is exact too, one sequence after the other
    if not options:
        trainer = ours(tiny_model_dir, tmp_path, loss_type="offset", bf16=True, share_prefix=True)
        trainer.evaluate()
        assert torch.float32 in seen


@pytest.mark.parametrize("loss_type", ["anchored", ["offset", "bias_variance"]])
def test_a_run_in_shared_rows(loss_type, tiny_model_dir, tmp_path):
    """Groups, empty traces, precomputed references and checkpointing give what plain rows give."""
    words = [" good", " bad film", " slow sad film", " very long sad film"]
    data = [
        {"prompt": f"what a{' long' * n} story", "completions": words, "scores": [0.0, 1.0, 2.0, 3.0]}
        for n in range(4)
    ]
    dataset = Dataset.from_list(data) if loss_type == "anchored" else None
    options = {
        "loss_type": loss_type,
        "gradient_checkpointing": True,
        "precompute_ref_log_probs": True,
        "max_steps": 3,
    }
    histories = []
    for rows, share in ((contextlib.nullcontext, False), (contextlib.nullcontext, True), (masked_rows, True)):
        with rows():
            folder = tmp_path / str(len(histories))
            trainer = ours(tiny_model_dir, folder, dataset=dataset, share_prefix=share, **options)
            trainer.train()
            trainer.evaluate()
        histories.append(history(trainer))
    first, *others = histories
    for plain, shared in [pair for other in others for pair in zip(first, other, strict=True)]:
        assert plain.keys() == shared.keys()
        for key, value in plain.items():
            if "accuracies" not in key:  # of margins that are 0 but for rounding, before the first step
                assert shared[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key


def test_shared_rows_online(tiny_model_dir, tmp_path):
    from tests.online.runs import Scripted, batch, learn, online

    results = []
    for rows, share in ((contextlib.nullcontext, False), (contextlib.nullcontext, True), (masked_rows, True)):
        with rows():
            trainer = online(
                tiny_model_dir, tmp_path, cls=Scripted, loss_type="anchored", num_generations=4, share_prefix=share
            )
            results.append(learn(trainer, batch(trainer)))
    (loss, gradients), *others = results
    for other, shared in others:
        torch.testing.assert_close(other, loss)
        for name, value in gradients.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=2e-6)


def test_moe_with_its_auxiliary_loss(tmp_path):
    from tests.logprobs.families import EXACT, tiny

    results = []
    for aux, backend in ((True, "trl"), (True, "auto"), (False, "auto")):
        model = tiny("qwen3_moe", {**EXACT["qwen3_moe"], "vocab_size": 600})
        trainer = moe_trainer(model, tmp_path, backend, 0.1 if aux else 0.0)
        assert trainer.aux_loss_enabled is aux
        if backend == "auto":
            assert (trainer._scorer.sharing is None) is aux
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
    logged = trainer._means["train"].over_processes()
    assert logged["loss/sigmoid"] == pytest.approx(losses["sigmoid", 0.0], rel=1e-5)
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


def test_where_prompts_are_not_shared_no_batch_is_laid_out(tiny_model_dir, tmp_path):
    for options in ({"share_prefix": False}, {"logprob_backend": "trl", "loss_type": "offset"}):
        rows, _ = from_batch(first_batch(ours(tiny_model_dir, tmp_path, **options)))
        assert rows.layout is None
