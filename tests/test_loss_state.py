"""A run with a loss that remembers: when its state moves, what a checkpoint holds of it, and that a resumed run goes on."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests import stateful
from tests.helpers import assert_same_parameters, build, history, parameters
from tests.stateful import Centred
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.trainers.checkpoints import CONTENTS


LEARNS = {"learning_rate": 1e-2, "train_sampling_strategy": "sequential", "beta": 0.5}
SAVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def registered():
    with stateful.registered():
        yield


def trainer(model_dir, folder, **options):
    return build(DPOTrainer, DPOConfig, model_dir, folder, **{"loss_type": "centred", **LEARNS, **options})


def state_of(trained, name="centred"):
    return {key: value.clone() for key, value in trained._terms.state[name].items()}


class Watch(TrainerCallback):
    """The deltas of each batch that a loss saw, with the state that it read."""

    def __init__(self, monkeypatch):
        self.seen = []
        before = Centred.__call__

        def call(loss, batch):
            self.seen.append((batch.delta.detach().double(), batch.state["mean"].item()))
            return before(loss, batch)

        monkeypatch.setattr(Centred, "__call__", call)


@pytest.mark.parametrize("loss_type", ["centred", "centred_before"])
def test_the_state_moves_with_each_micro_batch(loss_type, tiny_model_dir, tmp_path, monkeypatch):
    """Two steps of two micro-batches of two rows; the logged loss is that of the deltas around the state, by hand."""
    watch = Watch(monkeypatch)
    trained = trainer(
        tiny_model_dir, tmp_path, loss_type=loss_type, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2
    )  # fmt: skip
    trained.train()
    assert state_of(trained, loss_type)["batches"].item() == len(watch.seen) == 4
    mean, losses, centres = 0.0, [], []
    for deltas, read in watch.seen:
        after = 0.5 * mean + 0.5 * deltas.mean().item()
        assert read == pytest.approx(after if loss_type == "centred" else mean, abs=1e-5)
        losses.append(sum(math.log1p(math.exp(-0.5 * (delta - read))) for delta in deltas.tolist()) / 2)
        centres.append(read)
        mean = after
    assert state_of(trained, loss_type)["mean"].item() == pytest.approx(mean, abs=1e-5) != 0
    for index in (0, 1):
        entry = history(trained)[index]
        assert entry["loss"] == pytest.approx(sum(losses[2 * index : 2 * index + 2]) / 2, rel=1e-4)
        assert entry["centre"] == pytest.approx(sum(centres[2 * index : 2 * index + 2]) / 2, abs=1e-5)


def test_evaluation_leaves_the_state_alone(tiny_model_dir, tmp_path, monkeypatch):
    evaluated = trainer(tiny_model_dir, tmp_path / "a", eval_strategy="steps", eval_steps=1)
    before = evaluated.evaluate()  # before the first step it is that of `init_state`
    assert before["eval_centre"] == 0 and state_of(evaluated)["batches"].item() == 0
    evaluated.train()
    plain = trainer(tiny_model_dir, tmp_path / "b")
    plain.train()
    assert state_of(evaluated) == state_of(plain) and state_of(plain)["batches"].item() == 3
    assert_same_parameters(parameters(evaluated), parameters(plain))
    last = [entry for entry in history(evaluated) if "eval_centre" in entry][-1]
    assert last["eval_centre"] == pytest.approx(state_of(plain)["mean"].item(), rel=1e-5) != 0


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed


@pytest.mark.parametrize("loss_type", ["centred", ["sigmoid", "centred", "centred_before"]], ids=["alone", "mixed"])
def test_a_resumed_run_equals_the_uninterrupted_one(loss_type, tiny_model_dir, tmp_path):
    """Killed in its fourth step, with the checkpoint of the second."""
    whole = trainer(tiny_model_dir, tmp_path / "whole", loss_type=loss_type, **SAVES)
    whole.train()
    killed = trainer(
        tiny_model_dir, tmp_path / "run", loss_type=loss_type, **SAVES, trainer_kwargs={"callbacks": [Kill()]}
    )
    with pytest.raises(Killed):
        killed.train()
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "loss_state.safetensors")
    names = ["centred", "centred_before"] if isinstance(loss_type, list) else ["centred"]
    assert set(saved) == {f"{name}/{key}" for name in names for key in ("mean", "batches")}
    resumed = trainer(tiny_model_dir, tmp_path / "run", loss_type=loss_type, **SAVES)
    resumed.train(resume_from_checkpoint=True)
    for name in names:
        assert saved[f"{name}/batches"].item() == 2 and state_of(whole, name)["batches"].item() == 4
        assert state_of(resumed, name) == state_of(whole, name)
        assert saved[f"{name}/mean"] != state_of(whole, name)["mean"]
    assert_same_parameters(parameters(resumed), parameters(whole))
    for entry, again in zip(history(whole)[2:4], history(resumed)[2:4], strict=True):
        # TRL counts the tokens of a process, not of a run
        assert {**entry, "num_tokens": 0} == {**again, "num_tokens": 0} and "centre" in entry


def test_a_checkpoint_without_the_state_is_refused(tiny_model_dir, tmp_path):
    trainer(tiny_model_dir, tmp_path, **SAVES).train()
    for name in ("loss_state.safetensors", CONTENTS):
        (tmp_path / "checkpoint-2" / name).unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-2 holds the state \{\} of losses; this run needs \{'centred/batches'"
    ):
        trainer(tiny_model_dir, tmp_path, **SAVES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_measured_gradients_leave_the_state_of_another_loss_alone(tiny_model_dir, tmp_path):
    trained = trainer(
        tiny_model_dir, tmp_path, loss_type=["bias_variance", "centred"], loss_kwargs={"bias_variance": {"alpha": "auto"}}
    )  # fmt: skip
    trained.evaluate()
    assert trained._mixing.estimate is not None and state_of(trained)["batches"].item() == 0


def test_accumulated_gradients_do_not_hold_on_to_earlier_batches(tiny_model_dir, tmp_path):
    trained = trainer(tiny_model_dir, tmp_path, max_steps=1)
    trained.train()
    assert not any(value.requires_grad for value in state_of(trained).values())
    assert isinstance(trained._terms.state["centred"]["mean"], torch.Tensor)
