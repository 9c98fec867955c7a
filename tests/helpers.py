"""Runs of a few steps on tiny models, and what they are compared by."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import preference_rows
from trl_ext.trainers import shared_prompts


# TRL's loss types with the options without which they refuse to run or coincide with another
TRL_LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
OUR_LOSSES = (
    "alpha_dpo",
    "beta_dpo",
    "reward_distillation",
    "robust_em",
    "offset",
    "anchored",
    "margin_adaptive",
    "bias_variance",
    "length_regularized",
    "inpo",
    "sppo_soft",
    "asft",
    "cpo",
    "dmpo",
    "eurus",
    "simpo",
    "step_apo",
)
# Those that read no reference: a run of them has none
REFERENCE_FREE = (
    "asft",
    "cpo",
    "simpo",
)
# Those that read log-probs of tokens, which cannot be precomputed
OF_TOKENS = ("dmpo",)
# Their state moves with each micro-batch, so how rows are cut into micro-batches is part of the method
WITH_STATE = ("alpha_dpo", "beta_dpo", "robust_em")
# What each of our losses logs
LOSS_METRICS = {
    "alpha_dpo": {"margin/mean", "gap/running_mean", "gap/running_std"},
    "beta_dpo": {"beta/adapted", "kept/share", "delta/running_mean", "delta/running_std"},
    "reward_distillation": {"reward_gap/wanted"},
    "robust_em": {"confidence/mean", "reliability/mean", "reliability/min", "reliability/max"},
    "offset": {"offset/mean"},
    "anchored": {"target/mean"},
    "margin_adaptive": {"weight/mean", "weight/min", "weight/max"},
    "bias_variance": {"empty_trace/margins", "empty_trace/accuracies", "empty_trace/share"},
    "length_regularized": {"length_gap/mean", "length_margin/mean"},
    "inpo": {"margin/mean"},
    "sppo_soft": {"target/chosen", "target/rejected"},
    "asft": {"nll/mean", "log_odds/chosen", "log_odds/rejected"},
    "cpo": {"nll/mean"},
    "dmpo": {"turns/chosen", "turns/rejected"},
    "eurus": {"absolute/mean"},
    "simpo": {"per_token/margins", "per_token/accuracies"},
    "step_apo": {"offset/mean"},
}
# Of pairs, whatever the loss; log-ratios where there is a reference
SHARED_METRICS = {"lengths/chosen", "lengths/rejected", "logratios/chosen", "logratios/rejected"}


TIMINGS = ("runtime", "per_second", "total_flos")


def metrics_of(loss_type: str) -> set[str]:
    """What a run of one of our losses logs beside TRL's metrics."""
    without = {"logratios/chosen", "logratios/rejected"} if loss_type in REFERENCE_FREE else set()
    return (LOSS_METRICS[loss_type] | SHARED_METRICS) - without


def options(output_dir, **overrides) -> dict[str, Any]:
    """Arguments of a config for a short, deterministic float32 run on a CPU."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **overrides,
    }


def build(
    trainer_class, config_class, model_dir, output_dir, *, rows=12, dataset=None, trainer_kwargs=None, **overrides
):
    """A trainer on tiny data; `model_dir` is loaded anew."""
    dataset = Dataset.from_list(preference_rows(rows)) if dataset is None else dataset
    trainer_kwargs = {"eval_dataset": dataset, **(trainer_kwargs or {})}
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        args=config_class(**options(output_dir, **overrides)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=dataset,
        **trainer_kwargs,
    )


def history(trainer) -> list[dict[str, float]]:
    """What was logged, without timings."""
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMINGS)}
        for entry in trainer.state.log_history
    ]


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_same_parameters(first: dict, second: dict, **tolerance) -> None:
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert torch.equal(first[name], second[name]), name


def first_batch(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def loss_and_gradients(trainer, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one batch, and its gradients, without a training step."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@contextlib.contextmanager
def masked_rows() -> Iterator[None]:
    """While open, trainers are built as where attention takes no sequences: a dense mask keeps completions of a row apart."""
    with mock.patch.object(shared_prompts, "why_not_unpadded", lambda *args: "it attends through masks"):
        yield
