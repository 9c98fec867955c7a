"""`dataloader_drop_last` with fewer rows than a batch: TRL's trainers train nothing and say so in a warning."""

import contextlib
from types import SimpleNamespace

import pytest
from datasets import Dataset

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build
from tests.online.runs import online, prompts
from trl_ext.trainers.options import refuse_dropped_data
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


ROWS = preference_rows(4)
TRAINERS = {
    "DPO": (trl_ext.DPOTrainer, trl_ext.DPOConfig, [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in ROWS]),
    "Reward": (RewardTrainer, RewardConfig, [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in ROWS]),
    "SFT": (trl_ext.SFTTrainer, trl_ext.SFTConfig, [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]),
}  # fmt: skip
MESSAGE = "would drop all 4 rows of the train dataset: a batch of all processes has 5"


@pytest.mark.parametrize("name", TRAINERS)
def test_no_whole_batch_is_refused(name, tiny_model_dir, tmp_path):
    trainer, config, rows = TRAINERS[name]

    def built(batch, drop=True):
        return trainer(
            model=str(tiny_model_dir),
            args=config(
                output_dir=str(tmp_path), per_device_train_batch_size=batch, dataloader_drop_last=drop, use_cpu=True, bf16=False,
                report_to="none",
            ),
            train_dataset=Dataset.from_list(rows),
        )  # fmt: skip

    with pytest.raises(ValueError, match=MESSAGE):
        built(5)
    assert len(built(4).get_train_dataloader()) == 1
    assert len(built(5, drop=False).get_train_dataloader()) == 1


def test_online(tiny_model_dir, tmp_path):
    given = {"train_dataset": prompts(4)}
    with pytest.raises(ValueError, match=MESSAGE):
        online(
            tiny_model_dir,
            tmp_path,
            per_device_train_batch_size=5,
            dataloader_drop_last=True,
            trainer_kwargs=dict(given),
        )
    online(
        tiny_model_dir, tmp_path, per_device_train_batch_size=4, dataloader_drop_last=True, trainer_kwargs=dict(given)
    )


def test_a_stream_has_no_number_of_rows(tiny_model_dir, tmp_path):
    stream = Dataset.from_list(TRAINERS["DPO"][2]).to_iterable_dataset()
    given = {"dataset": stream, "per_device_train_batch_size": 5, "dataloader_drop_last": True}
    build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **given)


@pytest.mark.parametrize(("split", "message"), [(False, "would drop all 4 rows"), (True, None)])
def test_batches_of_several_processes(split, message):
    """Each process has a batch of its own, or a part of one."""
    accelerator = SimpleNamespace(num_processes=2, split_batches=split)
    args = SimpleNamespace(dataloader_drop_last=True, train_batch_size=4)
    trainer = SimpleNamespace(train_dataset=range(4), args=args, accelerator=accelerator)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        refuse_dropped_data(trainer)
