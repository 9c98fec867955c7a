"""What is logged: means over the rows that count, of all processes."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch, history, loss_and_gradients
from trl_ext.losses import PreferenceBatch, registry
from trl_ext.trainers import metrics
from trl_ext.trainers.metrics import Means, pair_metrics
from trl_ext.trainers.trl_seam import PAIR_METRICS


NAN = math.nan


def over_processes(monkeypatch, *means):
    """What the last of several processes, each with its own means, learns of all of them."""
    sent = []

    def gather(objects):
        sent.extend(objects)
        return list(sent)

    monkeypatch.setattr(metrics, "PartialState", lambda: SimpleNamespace(num_processes=len(means)))
    monkeypatch.setattr(metrics, "gather_object", gather)
    return [each.over_processes() for each in means][-1]


def means_of(*batches):
    means = Means()
    for values, rows in batches:
        means.add(values, rows)
    return means


def test_numbers_scalars_and_rows():
    batch = {
        "number": 2.5,
        "whole": 3,
        "scalar": torch.tensor(4.0, requires_grad=True),
        "rows": torch.tensor([1.0, NAN, 4.0]),
        "bools": torch.tensor([True, False, True, True]),
        "nowhere": torch.tensor([NAN, NAN]),
        "nothing": torch.tensor(NAN),
    }
    means = means_of((batch, 3))
    expected = {"number": 2.5, "whole": 3.0, "scalar": 4.0, "rows": 2.5, "bools": 0.75}
    assert means.over_processes() == pytest.approx(expected)
    assert means.over_processes() == Means().over_processes() == {}  # what was asked for is gone


def test_numbers_count_as_many_rows_as_they_are_means_of():
    """One row in the first micro-batch, three in the second, and values per row count once each."""
    first = {"number": 2.0, "scalar": torch.tensor(4.0), "rows": torch.tensor([8.0]), "first": 1.0}
    second = {
        "number": 4.0,
        "scalar": torch.tensor(8.0),
        "rows": torch.tensor([1.0, NAN, 3.0]),
        "second": torch.tensor(7.0),
    }
    assert means_of((first, 1), (second, 3)).over_processes() == {
        "number": (2 + 3 * 4) / 4, "scalar": (4 + 3 * 8) / 4, "rows": (8 + 1 + 3) / 3, "first": 1.0, "second": 7.0,
    }  # fmt: skip


def test_values_per_group_and_rank():
    """Whatever has dimensions has one value per entry."""
    assert means_of(({"table": torch.tensor([[1.0, NAN], [3.0, 5.0]])}, 2)).over_processes() == {"table": 3.0}


def test_sums_are_kept_in_double_precision():
    batches = [({"value": torch.tensor(1e8 + step)}, 1) for step in (0, 8, 16)]
    assert means_of(*batches).over_processes() == {"value": 1e8 + 8}


def test_processes_with_fewer_rows_count_less(monkeypatch):
    # This process: 1 row of value 1. The other: 3 rows that add up to 9, and of the second metric none
    mine = means_of(({"a": torch.tensor([1.0]), "b": torch.tensor([5.0, NAN]), "c": 2.0}, 1))
    other = means_of(({"a": torch.tensor([2.0, 3.0, 4.0]), "b": torch.tensor([NAN]), "c": 6.0}, 3))
    assert over_processes(monkeypatch, other, mine) == {"a": 2.5, "b": 5.0, "c": (2 + 3 * 6) / 4}


def test_processes_may_lack_what_another_has(monkeypatch):
    """Such as the metrics of empty-trace pairs, where none of its rows has one."""
    mine, other = means_of(({"a": 1.0, "x/max": 3.0}, 1)), means_of(({"b": 2.0, "x/min": 4.0}, 1))
    assert over_processes(monkeypatch, other, mine) == {"a": 1.0, "b": 2.0, "x/max": 3.0, "x/min": 4.0}
    assert over_processes(monkeypatch, Means(), means_of(({"a": 1.0}, 1))) == {"a": 1.0}


def test_extremes_are_those_of_all_micro_batches_and_processes(monkeypatch):
    """NaN, and a process without a value, are no extreme; `min` alone is one too: the name ends with it."""
    first = {
        "a/min": torch.tensor([3.0, NAN, 2.0]), "a/max": torch.tensor([-3.0, -2.0]), "min": torch.tensor([2.0, 3.0]),
        "b/min": torch.tensor([4.0]), "b/max": torch.tensor(-4.0), "c/max": torch.tensor([NAN]), "d/min": torch.ones(0),
    }  # fmt: skip
    second = {"a/min": 2.5, "a/max": torch.tensor([-1.5]), "min": torch.tensor([1.5])}
    own = {"a/min": 2.0, "a/max": -1.5, "min": 1.5, "b/min": 4.0, "b/max": -4.0}
    assert means_of((first, 3), (second, 1)).over_processes() == own
    other = {"a/min": 1.0, "a/max": -1.0, "min": 1.0}
    found = over_processes(monkeypatch, means_of((other, 1)), means_of((first, 3), (second, 1)))
    assert found == {**own, **other}


def test_rewards_of_pairs_by_hand():
    """Under the names that TRL has; a row without a traced pair has none of them."""
    sides = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -1.0, -3.0])]
    ref, lengths = [torch.tensor([-2.0, -2.0, -3.0]), torch.tensor([-1.0, -1.0, -3.0])], torch.tensor([2, 2, 0])
    empty = PreferenceBatch(*sides, *ref, lengths, lengths)
    batch = PreferenceBatch(*sides, *ref, lengths, lengths, beta=0.5, empty_trace=empty)
    found = pair_metrics(batch, PAIR_METRICS)
    assert list(found) == list(PAIR_METRICS)
    expected = {
        "rewards/chosen": [0.5, 0.0], "rewards/rejected": [-0.5, 0.0], "rewards/accuracies": [1.0, 0.0],
        "rewards/margins": [1.0, 0.0], "logps/chosen": [-1.0, -2.0], "logps/rejected": [-2.0, -1.0],
    }  # fmt: skip
    for name, values in expected.items():
        assert found[name][:2].tolist() == values and found[name][2].isnan(), name
    # Without a reference, rewards are beta times log-probabilities
    alone = pair_metrics(PreferenceBatch(*sides, None, None, lengths + 1, lengths + 1, beta=0.5), PAIR_METRICS)
    assert alone["rewards/chosen"].tolist() == [-0.5, -1.0, -1.5] and alone["rewards/margins"].tolist() == [
        0.5,
        -0.5,
        0.0,
    ]


def half_missing(rows=4):
    """Traced pairs in the first half alone."""
    data = preference_rows(rows)
    for row in data[rows // 2 :]:
        row["chosen"] = row["rejected"] = None
    return Dataset.from_list(data)


def test_rows_without_a_traced_pair_are_in_no_mean_of_it(tiny_model_dir, tmp_path):
    options = {"loss_type": "bias_variance", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    mixed = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=half_missing(), **options)
    whole = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=Dataset.from_list(preference_rows(4)[:2]),
        **options | {"per_device_train_batch_size": 2},
    )  # fmt: skip
    for trainer in (mixed, whole):
        for parameter in trainer.model.parameters():
            parameter.data += 0.02  # away from the reference
        trainer.compute_loss(trainer.model.train(), first_batch(trainer))
        # What TRL's own loss logs of pairs, means over all rows, is taken back
        assert not set(PAIR_METRICS) & trainer._metrics["train"].keys()
    found, expected = (trainer._means["train"].over_processes() for trainer in (mixed, whole))
    of_pairs = [name for name in expected if name.split("/")[0] in ("rewards", "logps", "lengths", "logratios")]
    assert len(of_pairs) == 10
    for name in of_pairs:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    assert found["empty_trace/share"] == 1.0


def test_a_batch_without_any_traced_pair(tiny_model_dir, tmp_path):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=half_missing(), loss_type="bias_variance",
        per_device_train_batch_size=2, train_sampling_strategy="sequential", max_steps=2, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.train()
    first, second = history(trainer)[:2]
    assert {"rewards/accuracies", "logps/chosen"} <= first.keys()
    assert not {"rewards/accuracies", "rewards/margins", "logps/chosen", "lengths/chosen"} & second.keys()
    assert second["empty_trace/share"] == 1.0


def test_each_of_trls_losses_in_a_mix_is_logged(tiny_model_dir, tmp_path):
    def run(loss_type, **overrides):
        trainer = build(
            trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, **overrides
        )
        for parameter in trainer.model.parameters():
            parameter.data += 0.02
        return trainer, *loss_and_gradients(trainer, first_batch(trainer))

    weights = {"sigmoid": 0.5, "hinge": 0.0, "sft": 2.0, "offset": 0.25}
    trainer, loss, gradients = run(list(weights), loss_weights=list(weights.values()))
    total, expected_gradients = 0.0, {}
    logged = trainer._means["train"].over_processes()
    for name, weight in weights.items():
        _, value, grads = run(name)
        assert logged[f"loss/{name}"] == pytest.approx(value.item(), rel=1e-5), name
        total += weight * value.item()
        for key, grad in grads.items():
            expected_gradients[key] = expected_gradients.get(key, 0) + weight * grad
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for key, grad in gradients.items():
        torch.testing.assert_close(grad, expected_gradients[key], rtol=1e-4, atol=1e-6)
    # TRL's metrics once, whatever the number of its losses
    alone, _, _ = run("sigmoid")
    for name, values in alone._metrics["train"].items():
        assert trainer._metrics["train"][name] == pytest.approx(values, rel=1e-5), name
    assert trainer.loss_types == ["sigmoid", "hinge", "sft"] and trainer.loss_weights == [0.5, 0.0, 2.0]


def test_tokens_of_whole_groups_are_counted(tiny_model_dir, tmp_path):
    words = [" good", " bad film", " slow sad film", " very long sad film"]
    data = Dataset.from_list(
        [
            {"prompt": "what a", "completions": words, "scores": [0.0, 1.0, 2.0, 3.0]},
            {"prompt": "why", "completions": words[:2], "scores": [1.0, 0.0]},
        ]
    )
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=data, loss_type="anchored", max_steps=1,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    tokenizer = trainer.processing_class
    sequences = [row["prompt"] + text + tokenizer.eos_token for row in data for text in row["completions"]]
    assert history(trainer)[0]["num_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in sequences)


def test_metrics_of_a_loss_may_be_floats_scalars_or_rows(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))

    @trl_ext.register_loss("talkative")
    @dataclass(frozen=True)
    class Talkative:
        def __call__(self, batch):
            return batch.delta**2

        def metrics(self, batch):
            rows = torch.arange(4.0)
            rows[0] = math.nan
            return {"float": 1.5, "int": 2, "scalar": torch.tensor(2.5), "rows": rows}

    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type="talkative", max_steps=1
    )
    trainer.train()
    logged = history(trainer)[0]
    assert [logged[name] for name in ("float", "int", "scalar", "rows")] == [1.5, 2.0, 2.5, 2.0]


def test_two_losses_with_one_metric_name(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    for name, value in (("one", 1.0), ("two", 2.0)):

        def make(name=name, value=value):
            @trl_ext.register_loss(name)
            @dataclass(frozen=True)
            class Named:
                def __call__(self, batch):
                    return batch.delta**2

                def metrics(self, batch):
                    return {"shared": value}

            Named.__qualname__ = name

        make()
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=["one", "two"], max_steps=1
    )
    trainer.train()
    logged = history(trainer)[0]
    assert (logged["shared"], logged["two/shared"]) == (1.0, 2.0)
