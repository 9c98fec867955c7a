"""Losses that state that they need no reference get none: no second model, no second forward."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import trl_ext
from tests.helpers import build, first_batch, history, loss_and_gradients
from trl_ext.losses import registry


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


def test_beside_a_loss_that_needs_one_there_is_one(policy_alone, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(policy_alone, "__call__", lambda self, batch: batch.chosen_logps * 0)
    for others in ("sigmoid", "offset"):
        trainer = build(
            trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=["policy_alone", others]
        )
        assert trainer.ref_model is not None
        trainer.compute_loss(trainer.model.train(), first_batch(trainer))
        assert trainer._metrics["train"]["rewards/margins"] == [pytest.approx(0, abs=1e-6)]


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
