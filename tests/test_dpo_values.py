"""Our losses in the trainer, in numbers: against full logits in float64, in their limits, mixed and weighted."""

import copy
import dataclasses
import functools

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.conftest import preference_rows
from tests.helpers import (
    LOSS_METRICS,
    OF_TOKENS,
    OUR_LOSSES,
    REFERENCE_FREE,
    SHARED_METRICS,
    assert_same_parameters,
    build,
    first_batch,
    history,
    loss_and_gradients,
    parameters,
)
from tests.plain import assert_equals_plain, one_turn, pair_batch
from trl_ext import DPOConfig, DPOTrainer, get_loss


@pytest.mark.parametrize(
    ("loss_type", "loss_kwargs", "ld_alpha"),
    [
        *((name, {}, None) for name in OUR_LOSSES),
        ("alpha_dpo", {"momentum": 0.5}, None),
        ("beta_dpo", {"rho": 0.5, "momentum": 0.5}, None),
        # Losses that read lengths, on both pairs
        ("bias_variance", {"base": "ipo", "alpha": 0.3}, None),
        ("bias_variance", {"base": "length_regularized", "alpha": 0.3}, None),
        *((name, {}, 0.3) for name in ("offset", "bias_variance", "sppo_soft")),
    ],
)
def test_loss_and_gradients_equal_the_plain_way(loss_type, loss_kwargs, ld_alpha, tiny_model_dir, tmp_path):
    # A reference that differs from the policy, so that no term vanishes
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, loss_kwargs=loss_kwargs or None,
        ld_alpha=ld_alpha, train_sampling_strategy="sequential",
        trainer_kwargs={} if loss_type in REFERENCE_FREE else {"ref_model": reference},
    )  # fmt: skip
    batch = first_batch(trainer)
    loss, gradients = loss_and_gradients(trainer, batch)

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64),
        copy.deepcopy(reference).double(),
    )
    rows = preference_rows(4)
    examples = list(trainer.train_dataset.select(range(4)))
    columns = {
        name: torch.tensor([row[name] for row in rows]) for name, value in rows[0].items() if isinstance(value, float)
    }
    plain = functools.partial(pair_batch, policy, reference, columns=columns, ld_alpha=ld_alpha)
    empty = plain([example["further_pairs"][0] for example in examples]) if loss_type == "bias_variance" else None
    expected_batch = plain(examples, empty_trace=empty)
    plain_loss = get_loss(loss_type, **loss_kwargs)
    if loss_type in OF_TOKENS:
        expected_batch = one_turn(expected_batch)
    state = plain_loss.init_state()
    if state and plain_loss.update_first:  # with the micro-batch taken in
        state = plain_loss.update(state, expected_batch)
    expected = plain_loss(dataclasses.replace(expected_batch, state=state)).mean()
    assert_equals_plain(loss, gradients, expected, policy)


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("options", [{}, {"share_prefix": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_rows_that_lack_a_pair_equal_the_plain_way(options, ld_alpha, tiny_model_dir, tmp_path):
    """The first row has no empty-trace pair, the second no traced one; LD-DPO compares the two completions of a pair."""
    rows = preference_rows(4)
    rows[0] |= {"chosen_empty_trace": None, "rejected_empty_trace": None}
    rows[1] |= {"chosen": None, "rejected": None}
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=["bias_variance", "length_regularized"], ld_alpha=ld_alpha,
        loss_kwargs={"bias_variance": {"alpha": 0.3, "base": "ipo"}}, dataset=Dataset.from_list(rows),
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
    loss, _ = loss_and_gradients(trainer, first_batch(trainer))

    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    policy = copy.deepcopy(trainer.model).double()
    examples = list(trainer.train_dataset)
    none = {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": []}
    plain = functools.partial(pair_batch, policy, reference, ld_alpha=ld_alpha)
    with torch.no_grad():
        traced = plain(examples)
        empty = plain([(example["further_pairs"] or [none])[0] for example in examples])
    assert traced.chosen_lengths[1] == empty.chosen_lengths[0] == 0
    # By the formulas: IPO on averages, of the pairs that are there, and DPO with a penalty for tokens, where nothing is log 2
    squares = []
    for batch in (traced, empty):
        averages = [
            ratios / lengths.clamp(min=1)
            for ratios, lengths in (
                (batch.chosen_logratios, batch.chosen_lengths), (batch.rejected_logratios, batch.rejected_lengths),
            )
        ]  # fmt: skip
        squares.append((averages[0] - averages[1] - 5.0) ** 2)
    squares[0][1] = squares[1][0] = 0  # what is not there
    first = 0.3 * squares[0] + 0.7 * squares[1]
    gap = 0.02 * (traced.chosen_lengths - traced.rejected_lengths)
    expected = (first - torch.nn.functional.logsigmoid(0.1 * traced.delta + gap)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize(
    ("loss_type", "loss_kwargs"),
    [
        ("beta_dpo", {"a": 0.0, "rho": 0.0}),
        ("offset", {"alpha": 0.0}),
        ("length_regularized", {"alpha": 0.0}),
        ("dmpo", {}),
        ("eurus", {"absolute_weight": 0.0}),
        ("step_apo", {"alpha": 0.0}),
        ("bias_variance", {"alpha": 1.0}),
    ],
)
def test_limit_trains_like_trls_sigmoid(loss_type, loss_kwargs, peft, tiny_model_dir, tmp_path):
    kwargs = {
        "trainer_kwargs": {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")}
        if peft
        else None
    }
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "trl", **kwargs)
    ours = build(
        DPOTrainer,
        DPOConfig,
        tiny_model_dir,
        tmp_path / "ours",
        loss_type=loss_type,
        loss_kwargs=loss_kwargs,
        **kwargs,
    )
    for trainer in (theirs, ours):
        trainer.train()
        trainer.evaluate()
    assert_same_parameters(parameters(theirs), parameters(ours), rtol=1e-4, atol=1e-5)
    # Every metric of TRL's is there, with its value, beside ours
    extra = LOSS_METRICS[loss_type] | SHARED_METRICS
    for expected, entry in zip(history(theirs), history(ours), strict=True):
        prefix = "eval_" if any(key.startswith("eval_") for key in entry) else ""
        if "train_loss" not in entry:
            assert entry.keys() == expected.keys() | {prefix + key for key in extra}
        for key, value in expected.items():
            if key not in ("num_tokens", "eval_num_tokens") or loss_type != "bias_variance":
                assert entry[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key


def test_anchored_without_scores_is_trls_sigmoid(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list(preference_rows(8)).select_columns(["prompt", "chosen", "rejected"])
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "trl", dataset=dataset)
    ours = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "ours", dataset=dataset, loss_type="anchored")
    theirs.train()
    ours.train()
    assert_same_parameters(parameters(theirs), parameters(ours), rtol=1e-4, atol=1e-6)


def test_mixture_is_the_weighted_sum(tiny_model_dir, tmp_path):
    def gradients(loss_type, **overrides):
        trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, **overrides)
        return loss_and_gradients(trainer, first_batch(trainer))

    mixture = ["sft", "offset", "bias_variance"]
    loss, grads = gradients(mixture, loss_weights=[0.5, 2.0, -0.25], loss_kwargs={"offset": {"alpha": 0.5}})
    parts = [gradients("sft"), gradients("offset", loss_kwargs={"alpha": 0.5}), gradients("bias_variance")]
    weights = [0.5, 2.0, -0.25]
    assert loss.item() == pytest.approx(
        sum(w * part[0].item() for w, part in zip(weights, parts, strict=True)), rel=1e-5
    )
    for name in grads:
        expected = sum(w * part[1][name] for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-6)


def test_mixture_logs_each_loss(tiny_model_dir, tmp_path):
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=["sigmoid", "offset", "margin_adaptive"]
    )
    trainer.train()
    assert {"loss/offset", "loss/margin_adaptive", "offset/mean", "weight/mean"} <= history(trainer)[0].keys()


def test_weight_scales_each_pair(tiny_model_dir, tmp_path):
    rows = preference_rows(8)
    weights = [0.0, 2.0, 1.0, 0.5, 0.0, 3.0, 1.0, 0.25]
    weighted = Dataset.from_list([{**row, "weight": weight} for row, weight in zip(rows, weights, strict=True)])
    for loss_type in ("sigmoid", "length_regularized", ["sigmoid", "offset"]):
        trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, dataset=weighted,
                        per_device_train_batch_size=8, train_sampling_strategy="sequential")  # fmt: skip
        loss, grads = loss_and_gradients(trainer, first_batch(trainer))
        singles = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, dataset=Dataset.from_list(rows),
                        per_device_train_batch_size=1, train_sampling_strategy="sequential")  # fmt: skip
        parts = [loss_and_gradients(singles, batch) for batch in singles.get_train_dataloader()]
        expected = sum(w * part[0] for w, part in zip(weights, parts, strict=True)) / 8
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name in grads:
            total = sum(w * part[1][name] for w, part in zip(weights, parts, strict=True)) / 8
            torch.testing.assert_close(grads[name], total, rtol=1e-4, atol=1e-6)


def test_weights_of_one_are_trls_sigmoid(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list([{**row, "weight": 1.0} for row in preference_rows(8)])
    ours = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "a", dataset=dataset)
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "b", dataset=dataset)
    for trainer in (ours, theirs):
        trainer.train()
    assert_same_parameters(parameters(ours), parameters(theirs), rtol=1e-4, atol=1e-6)
