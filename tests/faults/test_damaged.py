"""Files that were cut off or in which a bit has changed: refused, or computed anew, and never used as they are."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.faults.runs import length
from tests.helpers import options
from trl_ext.data.cache import Ledger, checksum, read_sealed, write_sealed
from trl_ext.data.sampling import sample_completions
from trl_ext.rounds import disk
from trl_ext.trainers import checkpoints
from trl_ext.trainers.checkpoints import CONTENTS, problem, whole_checkpoint


def harmed(data: bytes, every: int = 1):
    """Each way to cut bytes off at the end, and to change a bit; or every so-manieth."""
    yield from (data[:end] for end in range(0, len(data), every))
    for place in range(0, len(data), every):
        bit = 1 << place % 8
        yield data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def saving(folder, **overrides):
    return options(
        folder,
        **{"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "per_device_train_batch_size": 2, **overrides},
    )


@pytest.fixture(scope="module")
def offline(model, tmp_path_factory):
    """A trainer that has left two checkpoints, with the state of a loss and what the reference has said."""
    trainer = trl_ext.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl_ext.DPOConfig(**saving(tmp_path_factory.mktemp("offline"), loss_type="beta_dpo")),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(preference_rows(4)),
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def online(model, tmp_path_factory):
    """A folder with two checkpoints in the middle of a block, and a reference that moves."""
    folder = tmp_path_factory.mktemp("online")
    given = {
        "num_iterations": 3,
        "max_new_tokens": 4,
        "max_length": 64,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
    }
    trl_ext.OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl_ext.OnlineDPOConfig(**saving(folder, **given)),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=length,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in preference_rows(8)]),
    ).train()
    return folder


OFFLINE = [
    "model.safetensors",
    "losses.json",
    "loss_state.safetensors",
    "num_tokens.json",
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
]
ONLINE = ["block_0.json", "ref_model.safetensors", "losses.json", "trainer_state.json"]


@pytest.mark.parametrize(
    ("kind", "name"), [*(("offline", name) for name in OFFLINE), *(("online", name) for name in ONLINE)]
)
def test_a_damaged_file_of_a_checkpoint_is_found(kind, name, offline, online):
    folder = Path(offline.args.output_dir) if kind == "offline" else online
    checkpoint = folder / "checkpoint-2"
    path = checkpoint / name
    data = path.read_bytes()
    try:
        for bytes_ in harmed(data, max(1, len(data) // 20)):
            path.write_bytes(bytes_)
            assert f"{name} was cut off, changed or removed" in problem(checkpoint)
        path.unlink()
        assert name in problem(checkpoint)
        # Given, it is refused, and the message says from which one to go on; where it is asked for, the one before is taken
        with pytest.raises(ValueError, match=rf"{name}.*Resume from .*checkpoint-1\."):
            whole_checkpoint(str(folder), str(checkpoint))
        assert whole_checkpoint(str(folder), True) == str(folder / "checkpoint-1")
    finally:
        path.write_bytes(data)
    assert problem(checkpoint) is None


def test_of_a_large_file_the_size_is_compared(offline, monkeypatch):
    checkpoint = Path(offline.args.output_dir) / "checkpoint-2"
    monkeypatch.setattr(checkpoints, "LARGE", 1000)
    found = checkpoints._contents(checkpoint)
    assert all(size == (checkpoint / name).stat().st_size for name, (size, _) in found.items())
    assert found["model.safetensors"][1] is found["optimizer.pt"][1] is None
    assert found["losses.json"][1] == checksum(checkpoint / "losses.json")


def test_a_damaged_list_of_contents(offline):
    """Refused, or it says what it said."""
    checkpoint = Path(offline.args.output_dir) / "checkpoint-2"
    path = checkpoint / CONTENTS
    data = path.read_bytes()
    try:
        for bytes_ in harmed(data, 7):
            path.write_bytes(bytes_)
            said = problem(checkpoint)
            assert said is not None or json.loads(bytes_) == json.loads(data)
        path.unlink()  # a checkpoint of TRL's own trainer has none
        assert problem(checkpoint) is None
    finally:
        path.write_bytes(data)


def test_where_no_checkpoint_is_whole(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*start anew, without `resume_from_checkpoint`"):
        whole_checkpoint(str(tmp_path), True)
    with pytest.raises(
        ValueError, match=r"checkpoint-1 was not finished: it has no trainer_state\.json\. No other one is whole"
    ):
        whole_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-1"))
    for given in (None, False, "false"):
        assert whole_checkpoint(str(tmp_path), given) is None


def test_what_a_half_overwritten_checkpoint_was_before_does_not_count(offline, monkeypatch):
    """An earlier run in the same folder has left a whole one there."""
    checkpoint = Path(offline.args.output_dir) / "checkpoint-2"

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(offline, "_save_own", killed)
    kept = {path: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    try:
        with pytest.raises(KeyboardInterrupt):
            offline._save_checkpoint(offline.model, None)
        assert "was not finished" in problem(checkpoint)
    finally:
        for path, data in kept.items():
            path.write_bytes(data)


def test_an_older_checkpoint_stays_until_the_next_is_whole(offline, tmp_path, monkeypatch):
    """With room for one: killed before the newer one is whole, a run has the older one to go on from."""
    shutil.copytree(offline.args.output_dir, tmp_path, dirs_exist_ok=True)
    for name, value in {"output_dir": str(tmp_path), "save_total_limit": 1}.items():
        monkeypatch.setattr(offline.args, name, value)

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_contents", killed)
        with pytest.raises(KeyboardInterrupt):
            offline._save_checkpoint(offline.model, None)
    assert whole_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-1")
    assert offline.args.save_total_limit == 1
    offline._save_checkpoint(offline.model, None)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert whole_checkpoint(str(tmp_path), "True") == str(tmp_path / "checkpoint-2")


def test_what_an_earlier_run_left_is_no_part_of_a_checkpoint(offline):
    checkpoint = Path(offline.args.output_dir) / "checkpoint-2"
    (checkpoint / "block_0.json").write_text("{}")
    offline._save_checkpoint(offline.model, None)
    assert not (checkpoint / "block_0.json").exists() and problem(checkpoint) is None


def test_damaged_values_of_the_reference_are_not_used(offline, tmp_path, caplog):
    memory, name = offline._memory, "reference_memory_0.safetensors"
    path = tmp_path / name
    data = (Path(offline.args.output_dir) / "checkpoint-2" / name).read_bytes()
    path.write_bytes(data)
    memory.load(tmp_path)
    whole = {name: value.clone() for name, value in load_file(path).items()}  # not the file's own bytes
    assert len(whole["values"]) == 8 and memory.store.rows
    reference = memory._reference
    caplog.set_level(logging.CRITICAL)
    for bytes_ in harmed(data, 3):
        path.write_bytes(bytes_)
        memory.load(tmp_path)
        if memory.store.rows and memory._reference == reference:  # those of another reference are forgotten
            assert all(torch.equal(value, whole[name]) for name, value in memory.store.since(0).items())


# Kept results


def test_damaged_scores_are_computed_anew(tmp_path):
    ledger = Ledger(tmp_path, "x")
    known = {"a": 1.5, "b": -20.25, "c": 3e-5}
    ledger.append(known)
    data = ledger.path.read_bytes()
    for bytes_ in harmed(data):
        ledger.path.write_bytes(bytes_)
        found = Ledger(tmp_path, "x").read()
        assert found.items() <= known.items()
        assert len(found) < 3 or bytes_[: len(data) - 1] == data[:-1]  # but for the end of the last line
    assert len(list(tmp_path.iterdir())) == 1


def test_scores_of_an_older_version_are_read(tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.path.write_text('["a", 1.5]\n["b", 2.5]\n')
    assert ledger.read() == {"a": 1.5, "b": 2.5}


def test_damaged_answers_are_noticed(tmp_path):
    path, value = tmp_path / "a.json", [[[" a film", "stop"], ["é", "length"]], 0.1, float("inf")]
    write_sealed(path, value)
    data = path.read_bytes()
    assert read_sealed(path) == value and data.count(b"\n") == 2
    noticed = 0
    for bytes_ in harmed(data):
        path.write_bytes(bytes_)
        try:
            assert read_sealed(path) == value
        except ValueError as error:
            noticed += f"{path} is damaged: it was cut off or changed since it was written." in str(error)
    # Where it is not: line ends, and a checksum that was cut off whole
    assert noticed >= 2 * len(data) - 8


def test_damaged_completions_are_drawn_again(model, tmp_path, caplog):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in preference_rows(3)])
    given = {"max_new_tokens": 4, "batch_size": 1, "cache_dir": tmp_path, "dtype": torch.float32}
    whole = sample_completions(prompts, str(model), 2, **given).to_list()
    (path,) = tmp_path.glob("*/1.json")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"length", b"lengtX", 1) if b"length" in data else data[:-9])
    with caplog.at_level(logging.WARNING):
        assert sample_completions(prompts, str(model), 2, **given).to_list() == whole
    assert "1.json is damaged" in caplog.text and path.read_bytes() == data


# Rounds


def test_a_damaged_stage_is_refused_and_can_be_made_anew(tmp_path):
    rows, target = [{"a": 1.0}, {"a": 2.0}], tmp_path / "pairs"

    def make():
        (tmp_path / "shaping.json").write_text("{}")
        return Dataset.from_list(rows)

    def made():
        return disk.dataset_stage(target, make, ["shaping.json"]).to_list()

    assert made() == made() == rows
    for path in (*target.iterdir(), tmp_path / "shaping.json"):
        data = path.read_bytes()
        for bytes_ in harmed(data, max(1, len(data) // 5)):
            path.write_bytes(bytes_)
            with pytest.raises(ValueError, match=rf"{path.name} is damaged: .*Remove .*pairs\.done and start again"):
                made()
        path.write_bytes(data)
    assert made() == rows
    done = tmp_path / "pairs.done"
    data = done.read_bytes()
    for bytes_ in harmed(data, 11):
        if bytes_:  # an older version left it empty
            done.write_bytes(bytes_)
            with pytest.raises(ValueError, match=r"is damaged: .*Remove .*pairs\.done"):
                made()
    next(target.glob("*.arrow")).unlink()
    done.unlink()
    assert made() == rows and load_from_disk(target).to_list() == rows


def test_damaged_settings_of_rounds(tmp_path):
    disk.claim(tmp_path, {"seed": 3})
    path = tmp_path / "settings.json"
    data = path.read_bytes()
    for bytes_ in harmed(data):
        path.write_bytes(bytes_)
        if bytes_ != data:
            with pytest.raises(ValueError, match=r"settings\.json cannot be read|holds rounds with other settings"):
                disk.claim(tmp_path, {"seed": 3})
    path.unlink()
    disk.claim(tmp_path, {"seed": 3})
    assert path.read_bytes() == data
