"""Data loaders with worker processes: what is worked out there, and that the batches are those of one process."""

import pytest
import torch
from datasets import Dataset

from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, history, parameters
from tests.test_groups import groups
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.logprobs import sharing
from trl_ext.rows import from_batch
from trl_ext.trainers import scoring


def half_missing(rows=12):
    """Of each three rows one has no empty-trace pair and one no traced pair."""
    data = preference_rows(rows)
    for row in data[::3]:
        row |= {"chosen_empty_trace": None, "rejected_empty_trace": None}
    for row in data[1::3]:
        row |= {"chosen": None, "rejected": None}
    return Dataset.from_list(data)


KINDS = {
    "pairs": ({"loss_type": "sigmoid"}, lambda: Dataset.from_list(preference_rows(12))),
    "empty traces": ({"loss_type": "bias_variance"}, half_missing),
    "groups": ({"loss_type": "anchored"}, lambda: groups((3, 4, 2, 5))),
}


def trainer(model_dir, folder, dataset, workers, **options):
    options = {"max_steps": 2, "train_sampling_strategy": "sequential", "share_prefix": True, **options}
    return build(DPOTrainer, DPOConfig, model_dir, folder, dataset=dataset, dataloader_num_workers=workers, **options)


@pytest.fixture
def no_layout_here(monkeypatch):
    """From here on this process lays out no batch; its workers, forked from it, are let do it."""
    import torch.utils.data as data

    lay_out = sharing.shared_prefix_layout

    def refuse(*args):
        assert data.get_worker_info() is not None, "the layout is worked out in the training process"
        return lay_out(*args)

    monkeypatch.setattr(sharing, "shared_prefix_layout", refuse)
    monkeypatch.setattr(
        scoring, "why_differs", lambda *args: None
    )  # which lays out a few rows of the first batch itself


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_laid_out_in_the_workers(kind, tiny_model_dir, tmp_path, no_layout_here):
    options, data = KINDS[kind]
    trained = trainer(tiny_model_dir, tmp_path, data(), 2, **options)
    rows, _ = from_batch(next(iter(trained.get_train_dataloader())))
    assert rows.layout is not None
    trained.train()
    trained.evaluate()
    with pytest.raises(AssertionError, match="in the training process"):
        next(iter(trainer(tiny_model_dir, tmp_path, data(), 0, **options).get_train_dataloader()))


@pytest.mark.parametrize("kind", ["pairs", "empty traces"])
def test_a_stream_in_two_workers(kind, tiny_model_dir, tmp_path, no_layout_here):
    """Each worker reads one of the two shards of the stream, and lays out its batches."""
    options, data = KINDS[kind]
    stream = data().to_iterable_dataset(num_shards=2)
    trained = trainer(tiny_model_dir, tmp_path / "two", stream, 2, per_device_train_batch_size=3, **options)
    batches = [from_batch(batch) for batch in trained.get_train_dataloader()]
    assert len(batches) == 4 and all(rows.layout is not None for rows, _ in batches)
    # Every row once: the first worker has the first six rows, the second the others, in turn
    prompts = [row["prompt_ids"] for row in trained.train_dataset]
    found = []
    for rows, plan in batches:
        ids, attended, scored = (
            rows.inputs["input_ids"],
            rows.inputs["attention_mask"].bool(),
            rows.completion_mask.bool(),
        )
        found += [ids[row][attended[row] & ~scored[row]].tolist() for row in plan.pairs[:, 0]]
    assert found == [prompts[row] for start in (0, 6, 3, 9) for row in range(start, start + 3)]
    trained.train()


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_no_number(kind, tiny_model_dir, tmp_path):
    options, data = KINDS[kind]
    runs = []
    for workers in (0, 2):
        trained = trainer(tiny_model_dir, tmp_path / str(workers), data(), workers, **options)
        trained.train()
        runs.append(trained)
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]))
    assert history(runs[0]) == history(runs[1])


def test_precomputed_references_come_through_workers(tiny_model_dir, tmp_path):
    runs = []
    for options in ({"precompute_ref_log_probs": True}, {}):
        trained = trainer(
            tiny_model_dir, tmp_path / str(len(runs)), half_missing(), 2, loss_type="bias_variance", **options
        )  # fmt: skip
        rows, plan = from_batch(next(iter(trained.get_train_dataloader())))
        assert (rows.ref_logps is not None) is bool(options)
        trained.train()
        runs.append(trained)
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]), rtol=1e-4, atol=2e-5)
    # Of the first four rows the first and the fourth have no empty-trace pair, and the second has nothing to score
    assert rows.ref_logps is None and plan.empty_pairs.tolist() == [[-1, -1], [8, 9], [10, 11], [-1, -1]]
    examples = list(runs[0].train_dataset.select(range(4)))
    rows, _ = from_batch(next(iter(runs[0].get_train_dataloader())))
    expected = [example[f"ref_{side}_logps"] for side in ("chosen", "rejected") for example in examples]
    expected += [pair[f"ref_{side}_logps"] for example in examples for pair in example["further_pairs"]
                 for side in ("chosen", "rejected")]  # fmt: skip
    torch.testing.assert_close(rows.ref_logps, torch.tensor(expected))
