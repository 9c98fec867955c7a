"""How a step's eight rows are cut into micro-batches changes neither what is learnt nor what is logged."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, history, parameters
from trl_ext import DPOConfig, DPOTrainer, get_loss, list_losses


ROWS = 8
# Statistics of the micro-batch before are read, so how rows are cut is part of the method
WITH_STATISTICS = {
    "alpha_dpo": "a running mean and deviation of gaps, moved with each micro-batch",
    "beta_dpo": "a running mean and deviation of deltas, moved with each micro-batch, and pairs drawn from each",
    "robust_em": "reliabilities of annotators, moved with each micro-batch",
}
HYPERPARAMETERS = {"trpa": {"correct": 0.6}, "drpo": {"correct": 0.6, "max_length": 16, "kl_weight": 1.0}}
# TRL's: means over the tokens of a micro-batch, and of those one over micro-batches
OF_TOKENS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}


def of_groups() -> list[dict]:
    return [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], row["chosen_empty_trace"]],
            "scores": [row["score_chosen"], row["score_rejected"], 0.55],
            "behaviour_logps": [-30.0, -20.0 - index, -10.0],
        }
        for index, row in enumerate(preference_rows(ROWS))
    ]


@pytest.fixture(scope="module")
def teachers(tiny_model_dir):
    models = []
    for factor in (0.9, 1.1):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        models.append(model)
    return dict(zip(("teacher_model", "reverse_model"), models, strict=True))


def run(name: str, size: int, model_dir, folder, given: dict[str, Any]) -> DPOTrainer:
    """Two steps of plain gradient descent, whose weights are the sums of the gradients."""
    rows = preference_rows(ROWS) if get_loss(name, **HYPERPARAMETERS.get(name, {})).takes_pairs else of_groups()
    trainer = build(
        DPOTrainer, DPOConfig, model_dir, folder, dataset=Dataset.from_list(rows), loss_type=name, max_steps=2, optim="sgd",
        loss_kwargs=HYPERPARAMETERS.get(name), learning_rate=1e-3 if name == "inpo" else 0.01, max_grad_norm=0.0,
        per_device_train_batch_size=size, gradient_accumulation_steps=ROWS // size, trainer_kwargs=given,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", [name for name in list_losses() if name not in WITH_STATISTICS])
def test_micro_batches_of_one_of_four_and_of_eight(name, tiny_model_dir, tmp_path, request):
    given = request.getfixturevalue("teachers") if "teachers" in get_loss(name).reads else {}
    whole, halves, ones = (run(name, size, tiny_model_dir, tmp_path / str(size), given) for size in (8, 4, 1))
    for parts in (halves, ones):
        assert_same_parameters(parameters(parts), parameters(whole), **TOLERANCE)
        for ours, expected in zip(history(parts), history(whole), strict=True):
            ours, expected = ({k: v for k, v in each.items() if k not in OF_TOKENS} for each in (ours, expected))
            assert ours == pytest.approx(expected, rel=TOLERANCE["rtol"], abs=TOLERANCE["atol"])


def test_which_losses_have_statistics():
    with_state = {name for name in list_losses() if get_loss(name, **HYPERPARAMETERS.get(name, {})).init_state()}
    assert with_state == set(WITH_STATISTICS)
