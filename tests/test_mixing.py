"""The measured weight of `bias_variance`."""

import dataclasses

import pytest
import torch
from datasets import Dataset

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, history, parameters
from trl_ext.trainers.mixing import MixingEstimate, estimate_alpha


def trainer(model_dir, tmp_path, rows=None, **kwargs):
    dataset = Dataset.from_list(rows or preference_rows(8))
    options = {"loss_type": "bias_variance", "loss_kwargs": {"alpha": "auto"}, **kwargs}
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path, dataset=dataset, **options)


def by_definition(ours, rows):
    """From the gradients of each row, all kept."""
    gradients = []
    for alpha in (1.0, 0.0):
        side = []
        ours._losses = {"bias_variance": trl_ext.get_loss("bias_variance", alpha=alpha)}
        for example in list(ours.train_dataset)[:rows]:
            ours.model.zero_grad()
            ours.compute_loss(ours.model, ours._prepare_inputs(ours.data_collator([example]))).backward()
            side.append(torch.cat([p.grad.flatten() for p in ours.model.parameters() if p.grad is not None]).double())
        gradients.append(torch.stack(side))
    return gradients


def test_moments_are_those_of_the_rows(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path)
    estimate = estimate_alpha(ours, rows=6)
    traced, empty = by_definition(ours, 6)
    batch = ours.args.train_batch_size
    centered = [g - g.mean(0) for g in (traced, empty)]
    s_t, s_e, s_te = ((a * b).sum().item() / 5 for a, b in ((centered[0],) * 2, (centered[1],) * 2, centered))
    bias = max(((empty.mean(0) - traced.mean(0)) ** 2).sum().item() - (s_t + s_e - 2 * s_te) / 6, 0.0)
    assert estimate.traced_variance == pytest.approx(s_t / batch, rel=1e-3)
    assert estimate.empty_variance == pytest.approx(s_e / batch, rel=1e-3)
    assert estimate.covariance == pytest.approx(s_te / batch, rel=1e-2, abs=1e-6)
    assert estimate.empty_bias == pytest.approx(bias, rel=1e-2, abs=1e-6)
    assert not estimate.within_prompts and estimate.rows == 6


def test_alpha_has_the_smallest_error():
    estimate = MixingEstimate(0.0, 4.0, 1.0, 0.5, 2.0, 8, False, 10)
    a, b, c = 4.0, 3.0, 0.5
    best = dataclasses.replace(estimate, alpha=(b - c) / (a + b - 2 * c))
    grid = [best.error(alpha / 1000) for alpha in range(1001)]
    assert best.error(best.alpha) <= min(grid) + 1e-9
    assert best.variance(1.0) == 4.0 and best.variance_ratio == best.variance(best.alpha) / 4.0


def test_several_traces_of_a_prompt(tiny_model_dir, tmp_path):
    first = preference_rows(8)
    rows = [{**row, "prompt": first[i // 4]["prompt"]} for i, row in enumerate(first)]
    ours = trainer(tiny_model_dir, tmp_path, rows)
    estimate = estimate_alpha(ours, rows=8)
    assert estimate.within_prompts
    traced, _ = by_definition(ours, 8)
    prompts = [tuple(example["prompt_ids"]) for example in ours.train_dataset]
    variances = []
    for prompt in dict.fromkeys(prompts):
        group = traced[torch.tensor([p == prompt for p in prompts])]
        if len(group) > 1:
            variances.append(((group - group.mean(0)) ** 2).sum().item() / (len(group) - 1))
    expected = sum(variances) / len(variances) / ours.args.train_batch_size
    assert estimate.traced_variance == pytest.approx(expected, rel=1e-3)


def test_auto_is_used_logged_and_leaves_no_trace(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path)
    before = parameters(ours)
    estimate = estimate_alpha(ours)
    assert_same_parameters(parameters(ours), before)
    assert not any(ours._metrics["train"].values()) and ours.model.lm_head.weight.grad is None
    ours.train()
    entry = history(ours)[0]
    assert entry["mixing/alpha"] == pytest.approx(estimate.alpha) and 0 <= entry["mixing/variance_ratio"] < 2
    fixed = trainer(tiny_model_dir, tmp_path, loss_kwargs={"alpha": estimate.alpha})
    fixed.train()
    assert_same_parameters(parameters(ours), parameters(fixed))


def test_a_resumed_run_keeps_its_alpha(tiny_model_dir, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(tiny_model_dir, tmp_path / "run", **options)
    whole.train()
    again = trainer(tiny_model_dir, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_parameters(parameters(again), parameters(whole))


def test_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="or 'auto'"):
        trl_ext.get_loss("bias_variance", alpha="best")
    plain = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path)
    with pytest.raises(ValueError, match="needs a trainer with"):
        estimate_alpha(plain)
    rows = [
        {**row, "chosen_empty_trace": None, "rejected_empty_trace": None} if i else row
        for i, row in enumerate(preference_rows(4))
    ]
    with pytest.raises(ValueError, match="at least two rows"):
        estimate_alpha(trainer(tiny_model_dir, tmp_path, rows))
    with pytest.raises(ValueError, match="picked none"):
        estimate_alpha(trainer(tiny_model_dir, tmp_path), parameters=lambda name: False)
