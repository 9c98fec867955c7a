"""When means are logged: those since the last log, over all rows, once each, and none is lost at the end."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.conftest import preference_rows
from tests.helpers import build, first_batch, history, loss_and_gradients
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.trainers import metrics


ROWS = preference_rows(12)
MARGINS = [math.log(row["score_chosen"] - row["score_rejected"]) for row in ROWS]


def trainer(model_dir, tmp_path, rows=12, **options):
    options = {"loss_type": "offset", "train_sampling_strategy": "sequential", **options}
    trainer_kwargs = {"eval_dataset": Dataset.from_list(ROWS[:4]), **options.pop("trainer_kwargs", {})}
    return build(
        DPOTrainer, DPOConfig, model_dir, tmp_path, dataset=Dataset.from_list(ROWS[:rows]), trainer_kwargs=trainer_kwargs,
        **options,
    )  # fmt: skip


def mean(values):
    return pytest.approx(sum(values) / len(values), rel=1e-5)


def test_a_mean_is_one_over_rows_and_not_over_batches(tiny_model_dir, tmp_path):
    """Steps of four rows and of two."""
    ours = trainer(tiny_model_dir, tmp_path, rows=6, max_steps=2, logging_steps=2)
    ours.train()
    assert history(ours)[0]["offset/mean"] == mean(MARGINS[:6])


def test_a_mean_is_one_over_all_micro_batches_of_a_step(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path, max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=3)
    ours.train()
    assert history(ours)[0]["offset/mean"] == mean(MARGINS[:6])


def test_extremes_are_those_since_the_last_log(tiny_model_dir, tmp_path):
    """The largest and the smallest weight of eight rows, in two steps."""
    ours = trainer(tiny_model_dir, tmp_path, loss_type="margin_adaptive", max_steps=2, logging_steps=2)
    ours.train()
    # sigma(c h) / sigma(h) with c = c_min + (c_max - c_min) sigma(lmbda (tau - h) - log 2) and the defaults 0.5, 2, 1, 2
    weights = []
    for row in ROWS[:8]:
        margin = row["score_chosen"] - row["score_rejected"]
        factor = 0.5 + 1.5 / (1 + 2 * math.exp(margin - 2.0))
        weights.append((1 + math.exp(-margin)) / (1 + math.exp(-factor * margin)))
    entry = history(ours)[0]
    assert entry["weight/min"] == pytest.approx(min(weights), rel=1e-5)
    assert entry["weight/max"] == pytest.approx(max(weights), rel=1e-5)
    assert entry["weight/mean"] == mean(weights)


@pytest.mark.parametrize("options", [{}, {"eval_strategy": "steps", "eval_steps": 3}], ids=["plain", "evaluated"])
def test_what_is_left_after_the_last_log_is_in_the_final_one(options, tiny_model_dir, tmp_path):
    """The third step is in no interval of two. That it is evaluated last changes nothing."""
    ours = trainer(tiny_model_dir, tmp_path, max_steps=3, logging_steps=2, **options)
    ours.train()
    entries = history(ours)
    assert entries[0]["offset/mean"] == mean(MARGINS[:8])
    assert "train_loss" in entries[-1] and entries[-1]["offset/mean"] == mean(MARGINS[8:])
    for entry in entries[1:-1]:
        assert "eval_loss" in entry and entry["eval_offset/mean"] == mean(MARGINS[:4]) and "offset/mean" not in entry


def test_an_evaluation_between_logs_has_its_own_means(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path, max_steps=3, logging_steps=3, eval_strategy="steps", eval_steps=1)
    ours.train()
    evaluated = [entry for entry in history(ours) if "eval_loss" in entry]
    assert [entry["eval_offset/mean"] for entry in evaluated] == [mean(MARGINS[:4])] * 3
    assert [entry["offset/mean"] for entry in history(ours) if "offset/mean" in entry] == [mean(MARGINS)]


def test_no_process_waits_where_a_script_logs(tiny_model_dir, tmp_path, monkeypatch):
    """A callback may log in the first process alone: that asks no other process, and takes nothing from the next log."""
    gathered = []

    def gather(objects):
        gathered.append(trained.state.global_step)
        return objects

    class Says(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            before = len(gathered)
            trained.log({"said": 1.0})
            assert len(gathered) == before

    class Two:
        num_processes, process_index, is_main_process, local_process_index = 2, 0, True, 0

    trained = trainer(
        tiny_model_dir, tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        trainer_kwargs={"callbacks": [Says()]},
    )  # fmt: skip
    monkeypatch.setattr(metrics, "PartialState", Two)
    monkeypatch.setattr(metrics, "gather_object", gather)
    trained.train()
    assert set(gathered) == {1}  # with the step that is logged
    said = [entry for entry in history(trained) if "said" in entry]
    assert len(said) == 3 and not any("offset/mean" in entry for entry in said)
    assert [entry["offset/mean"] for entry in history(trained) if "offset/mean" in entry] == [mean(MARGINS[:8])]


def test_steps_that_are_not_logged_ask_no_other_process(tiny_model_dir, tmp_path, monkeypatch):
    asked = []
    ours = trainer(tiny_model_dir, tmp_path, max_steps=3, logging_steps=2)
    collect = ours._means["train"].over_processes
    monkeypatch.setattr(
        ours._means["train"], "over_processes", lambda: asked.append(ours.state.global_step) or collect()
    )
    ours.train()
    assert set(asked) == {2, 3}


def test_a_loss_in_a_mix_is_logged_as_its_own_mean(tiny_model_dir, tmp_path):
    """Each row by its `weight`, whatever the weight of the loss in the mix."""
    weights = [2.0, 0.0, 1.0, 0.5]
    rows = [{**row, "weight": weight} for row, weight in zip(ROWS, weights, strict=False)]
    options = {"train_sampling_strategy": "sequential", "dataset": Dataset.from_list(rows)}
    mixed = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=["length_regularized", "offset"], loss_weights=[3.0, -0.5],
        **options,
    )  # fmt: skip
    loss, _ = loss_and_gradients(mixed, first_batch(mixed))
    logged = mixed._means["train"].over_processes()
    # The policy is its reference, so that delta is 0
    by_length, offset = [], []
    for row, example, weight in zip(rows, mixed.train_dataset, weights, strict=True):
        gap = len(example["chosen_ids"]) - len(example["rejected_ids"])
        by_length.append(weight * math.log1p(math.exp(-0.02 * gap)))
        offset.append(weight * math.log1p(math.exp(math.log(row["score_chosen"] - row["score_rejected"]))))
    assert logged["loss/length_regularized"] == mean(by_length)
    assert logged["loss/offset"] == mean(offset)
    assert logged["pair_weight/mean"] == mean(weights)
    expected = 3.0 * sum(by_length) / 4 - 0.5 * sum(offset) / 4
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)
