"""What is logged: means over the rows that count, of all processes."""

import math
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch, history, loss_and_gradients
from trl_ext.losses import registry
from trl_ext.trainers.metrics import means_over_processes


class TwoProcesses:
    """Stands for an accelerator whose other process has sent `other`."""

    device = torch.device("cpu")

    def __init__(self, other):
        self.other = other

    def gather(self, rows):
        return torch.cat([rows, self.other])


def test_numbers_scalars_and_rows():
    nan = math.nan
    means = means_over_processes(
        Accelerator(cpu=True),
        {
            "number": 2.5,
            "whole": 3,
            "scalar": torch.tensor(4.0, requires_grad=True),
            "rows": torch.tensor([1.0, nan, 4.0]),
            "bools": torch.tensor([True, False, True, True]),
            "nowhere": torch.tensor([nan, nan]),
        },
    )
    assert means == pytest.approx({"number": 2.5, "whole": 3.0, "scalar": 4.0, "rows": 2.5, "bools": 0.75})
    assert means_over_processes(Accelerator(cpu=True), {}) == {}


def test_processes_with_fewer_rows_count_less():
    # This process: 1 row of value 1. The other: 3 rows that add up to 9, and of the second metric none
    accelerator = TwoProcesses(torch.tensor([[[9.0, 3.0], [0.0, 0.0]]]))
    means = means_over_processes(accelerator, {"a": torch.tensor([1.0]), "b": torch.tensor([5.0, math.nan])})
    assert means == {"a": 2.5, "b": 5.0}


def test_extremes_are_those_of_all_processes():
    """A process without a value sends 0 of 0 rows, which is no extreme."""
    nan = math.nan
    own = {
        "a/min": torch.tensor([3.0, nan, 2.0]),
        "a/max": torch.tensor([-3.0, -2.0]),
        "min": torch.tensor([2.0, 3.0]),
    }
    own = {**own, "b/min": torch.tensor([4.0]), "b/max": torch.tensor([-4.0])}
    own["a/min"] = own["a/min"][[0, 2]]
    accelerator = TwoProcesses(torch.tensor([[[1.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]))
    means = means_over_processes(accelerator, own)
    # `min` alone is an extreme too: the name ends with it
    assert means == {"a/min": 1.0, "a/max": -1.0, "min": 1.0, "b/min": 4.0, "b/max": -4.0}
    alone = TwoProcesses(torch.tensor([[[0.0, 0.0]] * 5]))
    assert means_over_processes(alone, own) == {"a/min": 2.0, "a/max": -2.0, "min": 2.0, "b/min": 4.0, "b/max": -4.0}


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
    of_pairs = [
        name for name in whole._metrics["train"] if name.split("/")[0] in ("rewards", "logps", "lengths", "logratios")
    ]
    assert len(of_pairs) == 10
    for name in of_pairs:
        assert mixed._metrics["train"][name] == pytest.approx(whole._metrics["train"][name], rel=1e-4), name
    assert mixed._metrics["train"]["empty_trace/share"] == [1.0]


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
    for name, weight in weights.items():
        _, value, grads = run(name)
        assert trainer._metrics["train"][f"loss/{name}"] == [pytest.approx(value.item(), rel=1e-5)], name
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
