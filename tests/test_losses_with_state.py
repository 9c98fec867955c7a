"""Runs with our losses that remember: what a user is told before and after, and that nothing else moves their state."""

import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, history, parameters
from tests.online.runs import Scripted, online
from tests.test_loss_state import Kill, Killed
from trl_ext import DPOConfig, DPOTrainer


def labelled(rows=8, annotators=3):
    return Dataset.from_list([{**row, "annotator_id": i % annotators} for i, row in enumerate(preference_rows(rows))])


def state_of(trained, name):
    return {key: value.tolist() for key, value in trained._terms.state[name].items()}


def test_who_labelled_how_reliably_is_printed_when_training_ends(tiny_model_dir, tmp_path, capsys):
    trained = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=labelled(), loss_type="robust_em",
        loss_kwargs={"annotators": 4, "rate": 0.5}, learning_rate=1e-2, max_steps=2, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trained.evaluate()
    assert "annotator" not in capsys.readouterr().out
    trained.train()
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("robust_em")
    assert lines[start + 2].split() == ["annotator", "reliability", "pairs"]
    rows = [line.split() for line in lines[start + 3 : start + 6]]
    state = state_of(trained, "robust_em")
    assert {int(number): (float(value), int(count)) for number, value, count in rows} == {
        number: (pytest.approx(state["reliability"][number], abs=1e-4), count)
        for number, count in enumerate([3, 3, 2])
    }
    assert lines[start + 6] == "1 of 4 annotators had no pair and stay at 0.9."
    # The second step moves it, and has logged what it read before; in the first, policy and reference are one
    entry = history(trained)[1]
    assert entry["reliability/min"] == entry["reliability/max"] == pytest.approx(0.9, abs=1e-6)
    assert max(abs(value - 0.9) for value in state["reliability"][:3]) > 1e-4
    saved = load_file(tmp_path / "checkpoint-2" / "loss_state.safetensors")
    assert saved["robust_em/reliability"].tolist() == state["reliability"]


@pytest.mark.parametrize(
    ("column", "loss_kwargs", "message"),
    [
        (
            [0, 1, 2, 1],
            None,
            r"3 of 4 pairs of the train dataset .* row 1 \(annotator_id=1\).*`annotators=1`.*\"annotators\": N",
        ),
        ([0, 1, 2, 3], {"annotators": 3}, "1 of 4 pairs .* row 3 .*from 0 to 2"),
        ([0, 0.5, 1, 0], {"annotators": 2}, "1 of 4 pairs .*row 1"),
        (["a", "b", "a", "a"], {"annotators": 2}, "'annotator_id' of the train dataset holds text"),
        (None, {"annotators": 2}, "'robust_em' needs the column 'annotator_id'"),
    ],
)
def test_annotators_that_do_not_fit_are_refused_before_the_model_loads(column, loss_kwargs, message, tmp_path):
    dataset = Dataset.from_list(preference_rows(4))
    if column is not None:
        dataset = dataset.add_column("annotator_id", column)
    with pytest.raises(ValueError, match=message):
        DPOTrainer(
            model="no-such-model",
            args=DPOConfig(loss_type="robust_em", loss_kwargs=loss_kwargs, output_dir=str(tmp_path), bf16=False),
            train_dataset=dataset,
        )


def test_new_annotators_of_an_evaluation_are_refused(tiny_model_dir, tmp_path):
    trained = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, dataset=labelled(), loss_type="robust_em", loss_kwargs={"annotators": 3}
    )  # fmt: skip
    assert trained.evaluate(labelled(annotators=2))["eval_reliability/mean"] == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"of the eval dataset cannot be used, the first in row 3 \(annotator_id=3\)"):
        trained.evaluate(labelled(annotators=4))


@pytest.mark.parametrize("base", ["cpo", "simpo"])
def test_a_base_without_a_reference_has_none(base, tiny_model_dir, tmp_path):
    trained = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="re_po", loss_kwargs={"base": base}, max_steps=1
    )
    assert trained.ref_model is None
    trained.train()
    assert math.isfinite(history(trained)[0]["loss"])
    assert state_of(trained, "robust_em")["pairs"] == [4]


LOSSES = ["alpha_dpo", "beta_dpo", "robust_em"]
RUN = {
    "loss_type": LOSSES, "loss_kwargs": {"beta_dpo": {"rho": 0.5}, "robust_em": {"annotators": 3}}, "learning_rate": 1e-2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def test_a_killed_run_goes_on_exactly_whatever_else_draws(tiny_model_dir, tmp_path):
    """Killed in the fourth step; the resumed one draws random numbers that the whole one did not, and has evaluated."""
    whole = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "whole", dataset=labelled(), **RUN)
    whole.train()
    killed = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "run", dataset=labelled(), trainer_kwargs={"callbacks": [Kill()]}, **RUN
    )  # fmt: skip
    with pytest.raises(Killed):
        killed.train()
    resumed = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "run", dataset=labelled(), **RUN)
    resumed.evaluate()
    torch.rand(17)
    resumed.train(resume_from_checkpoint=True)
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "loss_state.safetensors")
    assert saved["beta_dpo/batches"] == 4
    for name in LOSSES:
        assert state_of(resumed, name) == state_of(whole, name)
    assert state_of(whole, "beta_dpo")["batches"] == 8 and state_of(whole, "alpha_dpo")["std"] > 0
    assert sum(state_of(whole, "robust_em")["pairs"]) == 16
    assert_same_parameters(parameters(resumed), parameters(whole))
    for entry, again in zip(history(whole)[2:4], history(resumed)[2:4], strict=True):
        assert {**entry, "num_tokens": 0} == {**again, "num_tokens": 0}
        assert entry["kept/share"] == 0.5


def test_micro_batches_are_part_of_the_method(tiny_model_dir, tmp_path):
    """One pair has no spread: 8 micro-batches of 1 pair leave the standard deviation at 0, 1 of 8 does not."""
    spreads = {}
    for size in (1, 8):
        trained = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / str(size), loss_type="alpha_dpo", max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, learning_rate=1e-2,
        )  # fmt: skip
        trained.train()
        spreads[size] = state_of(trained, "alpha_dpo")["std"]
    assert spreads[1] == 0 < spreads[8]


def test_statistics_are_those_of_the_deltas_of_a_run(tiny_model_dir, tmp_path):
    """One step on all rows, with a reference that differs: a tenth of mean and deviation of what is logged for each pair."""
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trained = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="beta_dpo", max_steps=1, per_device_train_batch_size=8,
        trainer_kwargs={"ref_model": reference},
    )  # fmt: skip
    trained.train()
    entry = history(trained)[0]
    gap = entry["logratios/chosen"] - entry["logratios/rejected"]
    assert state_of(trained, "beta_dpo")["mean"] == pytest.approx(0.1 * gap, rel=1e-4)
    assert entry["delta/running_mean"] == pytest.approx(0.1 * gap, rel=1e-4) != 0


def test_online_reliabilities_are_those_of_the_judges_labels(tiny_model_dir, tmp_path, capsys):
    trained = online(tiny_model_dir, tmp_path, cls=Scripted, loss_type="robust_em", max_steps=1)
    trained.train()
    counted = state_of(trained, "robust_em")["pairs"]
    assert (
        counted[0] > 0
        and f"        0  {state_of(trained, 'robust_em')['reliability'][0]:>11.4f}" in capsys.readouterr().out
    )
