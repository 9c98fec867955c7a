"""Checkpoints to resume from of which files are cut off, absent, or something else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hostile.refusal import refused
from trl_ext import get_loss
from trl_ext.rounds import disk
from trl_ext.trainers import checkpoints, with_terms
from trl_ext.trainers.checkpoint_files import check_checkpoint
from trl_ext.trainers.reference import FILE as REFERENCE
from trl_ext.trainers.reference import load_reference, save_reference
from trl_ext.trainers.reference_memory import Store
from trl_ext.trainers.terms import LOSSES_FILE, STATE_FILE, Terms


NAN = float("nan")
WHOLE_STATE = {"global_step": 1, "log_history": []}


def losses() -> Terms:
    return Terms({"beta_dpo": get_loss("beta_dpo")}, {"beta_dpo": 1.0})


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """What a run leaves, with weights of a few numbers."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps(WHOLE_STATE))
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    save_reference(torch.nn.Linear(2, 3), folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": torch.zeros(3)}, folder / name)
    losses().save(folder)
    check_checkpoint(folder)
    return folder


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def removed(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def changed(name: str, change: Callable[[dict], dict]) -> Callable[[Path], Any]:
    """Tensors of a file changed by somebody."""
    return lambda folder: save_file(change(load_file(folder / name)), folder / name)


JSONS, WEIGHTS = ("trainer_state.json", "config.json", LOSSES_FILE), ("model.safetensors", REFERENCE, STATE_FILE)
ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
BROKEN: dict[str, tuple[Callable, str]] = {
    **{f"{name} cut off": (cut(name), name) for name in (*JSONS, *WEIGHTS, *ARCHIVES)},
    **{f"{name} empty": (written(name, b""), name) for name in (*JSONS, *WEIGHTS, *ARCHIVES)},
    **{f"{name} rubbish": (written(name, bytes(range(256))), name) for name in (*JSONS, *WEIGHTS, *ARCHIVES)},
    **{f"{name} null": (written(name, b"null"), "holds None, not names with values") for name in JSONS},
    **{f"{name} a list": (written(name, b"[1]"), "holds [1], not names with values") for name in JSONS},
    **{f"{name} twice": (written(name, b'{"a": 1, "a": 2}'), "the name 'a' twice") for name in JSONS},
    **{f"{name} too deep": (written(name, b"[" * 100_000), "too deeply") for name in JSONS},
    **{f"{name} a pickle": (written(name, b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R."), name) for name in ARCHIVES},
    "no state of the trainer": (removed("trainer_state.json"), "it has no trainer_state.json"),
    "no step": (written("trainer_state.json", b"{}"), "`global_step` is None"),
    "a step below 0": (written("trainer_state.json", b'{"global_step": -5}'), "`global_step` is -5"),
    "a step in words": (written("trainer_state.json", b'{"global_step": "1"}'), "`global_step` is '1'"),
    "no folder": (shutil.rmtree, "There is no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_files(name, checkpoint, tmp_path):
    change, said = BROKEN[name]
    change(checkpoint)
    refused(lambda: check_checkpoint(checkpoint), said, tmp_path)


def test_trainers_look_before_they_resume(tmp_path, checkpoint, monkeypatch):
    """Of a folder by its name, and of the last one of the run, before transformers reads anything of it."""
    looked, trained = [], []
    monkeypatch.setattr(checkpoints, "check_checkpoint", looked.append)
    parent = type("Parent", (), {"train": lambda self, *args, **kwargs: trained.append(args)})
    trainer = type("Mine", (with_terms.WithTerms, parent), {})()
    trainer.args, trainer.model = SimpleNamespace(output_dir=str(tmp_path)), torch.nn.Linear(1, 1)
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    for given in (None, False, "here", True):
        trainer.train(given)
    assert looked == ["here", str(checkpoint)] and trained == [(None,), (None,), ("here",), (str(checkpoint),)]


STATES: dict[str, tuple[Callable, str]] = {
    "other losses": (written(LOSSES_FILE, b'{"offset": {"weight": 1.0}}'), "was trained with the losses {'offset'"),
    "losses in words": (written(LOSSES_FILE, b'"offset"'), "was trained with the losses offset"),
    "losses cut off": (cut(LOSSES_FILE), LOSSES_FILE),
    "state cut off": (cut(STATE_FILE), STATE_FILE),
    "state empty": (written(STATE_FILE, b""), STATE_FILE),
    "no state": (removed(STATE_FILE), "holds the state {}"),
    "other names": (changed(STATE_FILE, lambda each: {name + "x": value for name, value in each.items()}), "meanx"),
    "other shapes": (changed(STATE_FILE, lambda each: {name: torch.zeros(3) for name in each}), "(3,)"),
    "other types": (changed(STATE_FILE, lambda each: {name: value.double() for name, value in each.items()}), "torch.float64"),
    "one too many": (changed(STATE_FILE, lambda each: {**each, "beta_dpo/more": torch.zeros(())}), "beta_dpo/more"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_states_of_losses(name, checkpoint, tmp_path):
    change, said = STATES[name]
    change(checkpoint)
    terms = losses()
    before = {key: value.clone() for key, value in terms.state["beta_dpo"].items()}
    refused(lambda: terms.load(checkpoint), said, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in terms.state["beta_dpo"].items())


REFERENCES: dict[str, tuple[Callable, str]] = {
    "absent": (removed(REFERENCE), f"has no {REFERENCE}"),
    "a weight too few": (changed(REFERENCE, lambda each: {"weight": each["weight"]}), "['bias'] are absent"),
    "a weight too many": (changed(REFERENCE, lambda each: {**each, "more": torch.zeros(1)}), "['more'] are absent"),
    "another shape": (changed(REFERENCE, lambda each: {**each, "bias": torch.zeros(7)}), "['bias'] are absent or of another shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_references(name, checkpoint, tmp_path):
    change, said = REFERENCES[name]
    change(checkpoint)
    refused(lambda: load_reference(torch.nn.Linear(2, 3), checkpoint), said, tmp_path)


REMEMBERED: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"values": torch.tensor([-1.0, NAN])}, "not finite"),
    "infinite": ({"values": torch.tensor([-1.0, -float("inf")])}, "not finite"),
    "lengths below 0": ({"lengths": torch.tensor([3, -1])}, "lengths below 0"),
    "one value too few": ({"values": torch.tensor([-1.0])}, "do not belong together"),
    "one key too few": ({"keys": torch.zeros(1, 16, dtype=torch.uint8)}, "do not belong together"),
}


@pytest.mark.parametrize("name", REMEMBERED)
def test_what_a_reference_has_said(name, tmp_path):
    """It is refused by the store, and computed anew by the run."""
    from trl_ext.data.collator import KEY_BYTES

    given, said = REMEMBERED[name]
    keys = torch.arange(2 * KEY_BYTES, dtype=torch.uint8).view(2, KEY_BYTES)
    right = {"keys": keys, "lengths": torch.tensor([1, 1]), "values": torch.tensor([-1.0, -2.0])}
    store = Store(1e6, torch.device("cpu"))
    refused(lambda: store.take({**right, **given}), said, tmp_path)
    assert not store.rows
    store.take(right)
    assert len(store.rows) == 2


ROUNDS: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"model": "a/mod', "cannot be read"),
    "empty": (b"", "cannot be read"),
    "a list": (b"[1]", "it holds no settings"),
    "binary": (bytes(range(256)), "is not UTF-8"),
    "twice": (b'{"model": "a", "model": "b"}', "the name 'model' twice"),
    "others": (b'{"model": "another"}\n', "['model'] differ"),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_settings_of_rounds(name, tmp_path):
    content, said = ROUNDS[name]
    (tmp_path / "settings.json").write_bytes(content)
    refused(lambda: disk.claim(tmp_path, {"model": "a/model"}), said, tmp_path)


@pytest.mark.parametrize("kind", ["absent", "empty", "broken"])
def test_stages_of_rounds_that_are_marked_as_done(kind, tmp_path):
    (tmp_path / "pairs.done").write_text("")
    if kind != "absent":
        (tmp_path / "pairs").mkdir()
    if kind == "broken":
        (tmp_path / "pairs" / "state.json").write_text("{")
    refused(
        lambda: disk.dataset_stage(tmp_path / "pairs", lambda: 1 / 0), "is marked as done and cannot be read", tmp_path
    )
