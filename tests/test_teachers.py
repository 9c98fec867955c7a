"""A loss that reads teachers, in the trainers: what it is given, against full logits; which models it takes."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import (
    assert_same_parameters,
    build,
    first_batch,
    history,
    loss_and_gradients,
    masked_rows,
    parameters,
)
from tests.plain import assert_equals_plain
from trl_ext.logprobs import divergence as tiles


def changed(model_dir, seed: int, dtype=torch.float32):
    """The tiny model with other weights: a model that was trained on."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def teachers(tiny_model_dir):
    return {"teacher_model": changed(tiny_model_dir, 1), "reverse_model": changed(tiny_model_dir, 2)}


def trainer(model_dir, tmp_path, teachers, loss_type="aligndistil", dataset=None, trainer_kwargs=None, **options):
    options = {"train_sampling_strategy": "sequential", "beta": 0.5, "share_prefix": False, **options}
    return build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path, loss_type=loss_type, dataset=dataset,
        trainer_kwargs={**teachers, **(trainer_kwargs or {})}, **options,
    )  # fmt: skip


def completion_logits(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of each completion token, alone after its prompt, without padding or a batch."""
    return model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()


def plain_loss(policy, teachers, prompt, completion, beta=0.5, beta2=10.0, temperature=1.0, length_norm=True):
    """One completion: the formula written out over the whole vocabulary, token by token, from full logits in float64."""
    mine = completion_logits(policy, prompt, completion)
    with torch.no_grad():
        good, bad = (completion_logits(model, prompt, completion) for model in teachers)
    total = 0.0
    for z, z_good, z_bad in zip(mine, good, bad, strict=True):
        p_good, p_bad, p = ((each - each.max()).exp() / (each - each.max()).exp().sum() for each in (z_good, z_bad, z))
        w = beta2 * (p_good - p_bad).abs().sum() + 0.001
        goal = (z_good + w * (z_good - z_bad)) / temperature
        q = (goal - goal.max()).exp() / (goal - goal.max()).exp().sum()
        total = total + beta / w * (p * (p / q).log()).sum()
    return total / len(completion) if length_norm else total


def doubles(*models):
    return [copy.deepcopy(model).double() for model in models]


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({}, {}),
        ({"share_prefix": True}, {"length_norm": False}),
        ({"logprob_memory_mb": 0.2}, {"beta2": 2.0, "temperature": 1.5}),
        ({"gradient_checkpointing": False}, {"beta2": 0.0}),
    ],
    ids=str,
)
def test_loss_and_every_gradient_equal_the_plain_way(options, kwargs, tiny_model_dir, tmp_path, teachers):
    ours = trainer(tiny_model_dir, tmp_path, teachers, loss_kwargs=kwargs, **options)
    assert ours.ref_model is None
    loss, gradients = loss_and_gradients(ours, first_batch(ours))
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    plain = doubles(*teachers.values())
    examples = list(ours.train_dataset.select(range(4)))
    each = [plain_loss(policy, plain, row["prompt_ids"], row["chosen_ids"], **kwargs) for row in examples]
    assert_equals_plain(loss, gradients, torch.stack(each).mean(), policy)
    assert all(parameter.grad is None for model in ours._teachers.models for parameter in model.parameters())
