"""Losses that state that they need no reference get none: no second model, no second forward."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from trl.trainer import dpo_trainer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import REFERENCE_FREE, build, first_batch, history, loss_and_gradients, options
from trl_ext.losses import registry
from trl_ext.trainers import scoring


@pytest.fixture
def policy_alone(monkeypatch):
    """`-log sigma(beta (lp_w - lp_l))`, registered as `policy_alone`."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))

    @trl_ext.register_loss("policy_alone")
    @dataclass(frozen=True)
    class PolicyAlone:
        reads: ClassVar[frozenset[str]] = frozenset()

        def __call__(self, batch):
            assert batch.ref_chosen_logps is None and batch.ref_rejected_logps is None
            return -F.logsigmoid(batch.beta * (batch.chosen_logps - batch.rejected_logps))

    return PolicyAlone


@pytest.fixture
def mixable(policy_alone, monkeypatch):
    """The same where there may be a reference, for a loss beside it."""

    def call(self, batch):
        return -F.logsigmoid(batch.beta * (batch.chosen_logps - batch.rejected_logps))

    monkeypatch.setattr(policy_alone, "__call__", call)


@pytest.mark.parametrize("backend", ["auto", "trl"])
def test_there_is_no_reference(backend, policy_alone, tiny_model_dir, tmp_path, monkeypatch):
    built = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type="policy_alone", max_steps=1,
        logprob_backend=backend,
    )  # fmt: skip
    assert built.ref_model is None
    assert not built.args.precompute_ref_log_probs and not built.precompute_ref_logps
    calls = []
    monkeypatch.setattr(built, "compute_ref_log_probs", lambda *args: calls.append(args))
    batch = first_batch(built)
    loss, _ = loss_and_gradients(built, batch)
    logits = built.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    chosen, rejected = (logps * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    assert loss.item() == pytest.approx(-F.logsigmoid(0.1 * (chosen - rejected)).mean().item(), rel=1e-5)
    built.train()
    built.evaluate()
    assert not calls
    logged = history(built)[0]
    # Without a reference, rewards are beta times log-probs, as in TRL's CPO
    assert logged["rewards/chosen"] == pytest.approx(0.1 * logged["logps/chosen"], rel=1e-5)
    assert "logratios/chosen" not in logged


def test_a_policy_by_its_name_is_loaded_alone(tiny_model_dir, tmp_path, monkeypatch):
    loaded, load = [], dpo_trainer.create_model_from_path
    monkeypatch.setattr(
        dpo_trainer, "create_model_from_path", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs)
    )
    built = trl_ext.DPOTrainer(
        str(tiny_model_dir),
        args=trl_ext.DPOConfig(**options(tmp_path, loss_type="simpo")),
        train_dataset=Dataset.from_list(preference_rows(4)),
    )
    assert built.ref_model is None and loaded == [(str(tiny_model_dir),)]


@pytest.mark.parametrize("loss_type", REFERENCE_FREE)
def test_ours_take_one_forward_per_step(loss_type, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "why_differs", lambda *args: None)
    trained = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, max_steps=2)
    assert trained.ref_model is None
    calls = forwards(trained.model)
    trained.train()
    assert len(calls) == 2


def test_beside_a_loss_that_needs_one_there_is_one(policy_alone, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(policy_alone, "__call__", lambda self, batch: batch.chosen_logps * 0)
    for others in ("sigmoid", "offset"):
        trainer = build(
            trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=["policy_alone", others]
        )
        assert trainer.ref_model is not None
        trainer.compute_loss(trainer.model.train(), first_batch(trainer))
        assert trainer._metrics["train"]["rewards/margins"] == [pytest.approx(0, abs=1e-6)]


def forwards(model) -> list:
    """Each call of a model's backbone from now on."""
    calls = []
    base = getattr(model, "base_model", model)
    (getattr(base, "model", base)).register_forward_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("backend", ["auto", "trl"])
def test_a_step_is_one_forward(backend, peft, mixable, tiny_model_dir, tmp_path, monkeypatch):
    """
    With one micro-batch; a loss that reads the reference takes one of it too, of the same model where there is an adapter. What
    the first batch is compared with is not counted.
    """
    monkeypatch.setattr(scoring, "why_differs", lambda *args: None)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for loss_type, second in (("policy_alone", 0), ("offset", 1), (["policy_alone", "sigmoid"], 1)):
        trained = build(
            trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, logprob_backend=backend,
            max_steps=3, trainer_kwargs={"peft_config": config if peft else None},
        )  # fmt: skip
        calls = forwards(trained.model)
        referred = forwards(trained.ref_model) if trained.ref_model is not None else []
        assert (trained.ref_model is not None) is (second == 1 and not peft)
        trained.train()
        if peft:
            assert (len(calls), len(referred)) == (3 * (1 + second), 0), loss_type
        else:
            assert (len(calls), len(referred)) == (3, 3 * second), loss_type


def test_a_mix_is_the_sum_of_its_parts(mixable, tiny_model_dir, tmp_path):
    """What a loss without a reference is given is the same beside one that has it, and beside TRL's own."""

    def run(loss_type, **options):
        built = build(
            trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type,
            train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        for parameter in built.model.parameters():
            parameter.data += 0.02  # away from the reference
        return loss_and_gradients(built, first_batch(built))

    names, weights = ["policy_alone", "offset", "sigmoid"], [0.5, 2.0, -0.25]
    loss, gradients = run(names, loss_weights=weights)
    parts = [run(name) for name in names]
    assert loss.item() == pytest.approx(
        sum(w * part[0].item() for w, part in zip(weights, parts, strict=True)), rel=1e-5
    )
    for name, value in gradients.items():
        expected = sum(w * part[1][name] for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("option", ["sync_ref_model", "precompute_ref_log_probs"])
def test_options_that_would_do_nothing_are_refused(option, policy_alone, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=rf"reads a reference model, so \['{option}'\] would have no effect"):
        build(
            trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type="policy_alone", **{option: True}
        )


def test_a_reference_that_would_do_nothing_is_refused(policy_alone, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"\['ref_model'\] would have no effect"):
        build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type="policy_alone",
              trainer_kwargs={"ref_model": torch.nn.Identity()})  # fmt: skip
