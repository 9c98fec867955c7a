"""A loss, a gradient or weights that become NaN: the run stops with one message, and what was saved before stays."""

import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trl_ext
from tests.conftest import preference_rows
from tests.faults.runs import length
from tests.helpers import options
from tests.stateful import keep_registry
from trl_ext.losses.base import Loss
from trl_ext.trainers.checkpoints import last_whole
from trl_ext.trainers.finite import check_finite


@dataclass(frozen=True)
class Spoilt(Loss):
    """A plug-in's loss that divides by zero in its third batch."""

    def __call__(self, batch):
        number = int(os.environ.get("TEST_BATCH", "0")) + 1
        os.environ["TEST_BATCH"] = str(number)
        return -F.logsigmoid(batch.beta * batch.delta) / float(number != 3)


class Overflow(TrainerCallback):
    """What a learning rate that is too high does to a weight in the second step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(model.parameters()).data.view(-1)[5] = torch.inf


def trained(kind, model, folder, callbacks=None, **overrides):
    rows, saving = preference_rows(16), {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer_class, config = (getattr(trl_ext, f"{kind}{name}") for name in ("Trainer", "Config"))
    online = {"max_new_tokens": 4, "max_length": 64} if kind == "OnlineDPO" else {}
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config(**options(folder, **{**saving, **online, **overrides})),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows] if online else rows),
        callbacks=callbacks,
        **({"reward_funcs": length} if online else {}),
    )
    trainer.train()
    return trainer


@pytest.fixture(autouse=True)
def spoilt(monkeypatch):
    keep_registry(monkeypatch)
    trl_ext.register_loss("spoilt")(Spoilt)
    monkeypatch.setenv("TEST_BATCH", "0")


@pytest.mark.parametrize("kind", ["DPO", "OnlineDPO"])
def test_a_loss_that_becomes_nan_ends_the_run(kind, model, tmp_path):
    with pytest.raises(
        ValueError, match=r"Training stops after step 3: weights are NaN or infinite.*checkpoint-2 is the last"
    ):
        trained(kind, model, tmp_path, loss_type="spoilt")
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-2") and not (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("kind", ["DPO", "OnlineDPO"])
def test_weights_that_are_not_finite_are_not_saved(kind, model, tmp_path):
    """Nor where nothing is logged: at the save, or when training ends."""
    for given in ({"save_steps": 2}, {"save_strategy": "no", "max_steps": 2}):
        with pytest.raises(
            ValueError, match=r"after step 2: weights are NaN or infinite.*No checkpoint was saved before"
        ):
            trained(kind, model, tmp_path, [Overflow()], logging_steps=100, **given)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_run_whose_numbers_are_finite_goes_on(model, tmp_path):
    assert trained("DPO", model, tmp_path).state.global_step == 4


def test_a_gradient_that_overflows_is_no_reason_to_stop(model, tmp_path):
    """Clipping, or a scaler, may have left the weights as they were; where it has not, the run ends at the next log."""
    trainer = trained("DPO", model, tmp_path, save_strategy="no", max_steps=1)
    trainer.control.should_log, trainer.control.should_training_stop = True, False
    check_finite(trainer, torch.tensor(torch.inf))
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[0] = torch.nan
    check_finite(trainer, torch.tensor(1.0))
    with pytest.raises(ValueError, match="after step 1: weights are NaN or infinite"):
        check_finite(trainer, torch.tensor(torch.nan))
