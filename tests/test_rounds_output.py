"""What rounds say as they go on, and where their trainings are logged."""

import json
import os
import re
import sys
import types

import pytest
from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from tests.test_rounds import longer, prompts_file, settings
from trl_ext.data.preference_model import PreferenceModel
from trl_ext.data.rewards import JudgeFunction, RewardFunction
from trl_ext.rounds import IterativeDPO, RoundsConfig, progress, report, trackers


GOOD = {"round": 1, "prompts": 4, "mean_score": 1.0, "mean_length": 100.0, "truncated": 0.0, "tied": 0.0, "pairs": 4,
        "length_gap": 1.0, "length_penalty": 0.0}  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    return prompts_file(tmp_path)


def shown(table) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(table)
    return console.export_text()


# Hints


def test_good_figures_have_no_hint():
    assert report.hints(GOOD) == {}
    after = {name: GOOD[name] for name in ("round", "prompts", "mean_score", "mean_length", "truncated", "tied")}
    assert report.hints(after) == {}


@pytest.mark.parametrize(
    ("figure", "value", "said"),
    [
        ("truncated", 1.0, "all were cut off, and scores are of unfinished texts: raise sampling.max_new_tokens"),
        ("truncated", 0.2, "many were cut off"),
        ("truncated", 0.19, None),
        ("tied", 1.0, "all prompts: no two completions differ in score"),
        ("tied", 0.5, "share of prompts that teach nothing"),
        ("tied", 0.49, None),
        ("length_gap", 20.5, "longer answers win"),
        ("length_gap", 20.0, None),
        ("length_gap", -50.0, None),
    ],
)
def test_a_bad_figure_has_one(figure, value, said):
    row = {**GOOD, figure: value}
    found = report.hints(row)
    assert list(found) == ([] if said is None else [figure])
    assert said is None or found[figure].startswith(said)
    lines = [line for line in shown(report.round_table(row, "Round 1")).splitlines() if said and said in line]
    assert len(lines) == (said is not None) and all(f"{value:.3f}" in line for line in lines)


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (JudgeFunction(longer), 0.5),
        (PreferenceModel("some/model"), 0.5),
        (PreferenceModel("some/model", scores="score"), 0.0),
        (RewardFunction(len), None),
        ("implicit", None),
    ],
)
def test_scores_of_a_judge_say_nothing_of_progress(scorer, expected, tmp_path):
    data = Dataset.from_list([{"completions": ["a", "b"], "stop_reasons": ["stop"] * 2, "scores": [0.25, 0.75]}])
    row = report.round_metrics(1, tmp_path, data, data, scorer=scorer)
    assert row.get("score_by_construction") == expected
    said = f"{expected:g} by construction" if expected is not None else "by construction"
    for table in (report.round_table(row, "Round 1"), report.table([row, row])):
        assert shown(table).count(said) == (expected is not None)


def test_a_group_of_equal_scores_is_tied(tmp_path):
    samples = Dataset.from_list([{"completions": ["a", "b"], "stop_reasons": ["stop"] * 2}] * 4)
    scored = Dataset.from_dict({"scores": [[1.0, 1.0], [1.0, 1.5], [0.0, 0.0], [2.0, 2.0]]})
    assert report.round_metrics(1, tmp_path, samples, scored)["tied"] == 0.75


# Lines


def test_durations():
    said = [progress.duration(seconds) for seconds in (0.04, 59.9, 59.96, 125.2, 3599.6, 7500)]
    assert said == ["0.0 s", "59.9 s", "1 min 0 s", "2 min 5 s", "1 h 0 min", "2 h 5 min"]


def test_what_a_stage_says(tmp_path):
    samples = Dataset.from_dict({"completions": [["a", "b"], ["c", "d"], ["", "e"]]})
    scored = Dataset.from_dict({"scores": [[1.0, 2.0], [0.0, 1.0]]})
    assert progress.sampled(samples) == "6 completions of 3 prompts"
    assert progress.scored_of(samples)(scored) == "4 scores, 1 prompt left out: fewer than two completions with text"
    assert progress.scored_of(scored)(scored) == "4 scores"
    assert progress.paired(Dataset.from_dict({"chosen": ["a"]})) == "1 pair"
    assert progress.paired(Dataset.from_dict({"completions": [["a"], ["b"]]})) == "2 groups"
    log = [{"round/tied": 0.0, "step": 0}, {"loss": 0.6931, "step": 5}, {"loss": 0.5, "step": 10}, {"train_loss": 1.0}]
    for entries, said in ((log, "10 steps, loss 0.693 to 0.500"), (log[:2], "5 steps, loss 0.693"), ([], "no step was logged")):  # fmt: skip
        (tmp_path / "log.json").write_text(json.dumps(entries))
        assert progress.trained_in(tmp_path)().startswith(said)


def test_a_run_says_each_stage_once(tiny_model_dir, prompts, tmp_path, capsys):
    given = settings(tiny_model_dir, prompts, tmp_path / "run", training={"logging_steps": 1})
    del given["reward_funcs"]
    config = RoundsConfig(**given, judge="tests.test_rounds:longer", extrapolation=0.5)
    IterativeDPO(config).run()
    said = capsys.readouterr().out
    where = re.findall(r"^(round \d of 2|after round 2)  (\w+) .*\((?:[\d.]+ s|\d+ min \d+ s)\)$", said, flags=re.M)
    stages = ["sample", "score", "pair", "train"]
    assert where == [
        *(("round 1 of 2", name) for name in stages),
        *(("round 2 of 2", name) for name in [*stages, "extrapolate"]),
        *(("after round 2", name) for name in stages[:2]),
    ]
    assert "12 completions of 4 prompts" in said and "2 steps, loss " in said and "by 0.5  (" in said
    # The table stands before the training, while there is time to stop it
    assert said.index("What the policy wrote at the start of round 1") < said.index("round 1 of 2  train")
    assert said.count("0.5 by construction") == 2 and "all were cut off" in said
    IterativeDPO(config).run()
    assert capsys.readouterr().out.count("(done before)") == 11


# Where it is logged


class Tracker(TrainerCallback):
    """Stands for W&B's and trackio's callbacks: keeps what they would read, and what is logged."""

    runs: list = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.runs.append((args.run_name, args.project, os.environ.get("WANDB_RUN_GROUP"), []))
        sys.modules["wandb"].run = "open"

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.runs[-1][-1].append((state.global_step, dict(logs)))


@pytest.fixture
def wandb(monkeypatch):
    """A module in W&B's place, and its callback."""
    module = types.SimpleNamespace(run=None, finished=0)

    def finish():
        module.run, module.finished = None, module.finished + 1

    module.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.setattr(Tracker, "runs", [])
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    return module


def test_a_run_for_each_round_in_one_group(wandb, tiny_model_dir, prompts, tmp_path):
    training = {"report_to": "wandb", "logging_steps": 1}
    metrics = IterativeDPO(
        RoundsConfig(**settings(tiny_model_dir, prompts, tmp_path / "mine", training=training))
    ).run()
    assert [run[:3] for run in Tracker.runs] == [("mine-round-1", "mine", "mine"), ("mine-round-2", "mine", "mine")]
    assert wandb.finished == 2 and "WANDB_RUN_GROUP" not in os.environ
    for (*_, logged), row in zip(Tracker.runs, metrics, strict=False):
        assert [step for step, _ in logged] == [0, 1, 2, 2]  # the round, two steps, the end
        first = {name: value for name, value in logged[0][1].items() if name.startswith("round/")}
        assert first == {f"round/{name}": float(value) for name, value in row.items() if name != "round"}
        assert "loss" in logged[1][1]


def test_names_of_the_users_are_kept(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "logs")
    wandb.run = "opened by the script"
    with trackers.one_run("mine", "mine-round-3"):
        assert os.environ["WANDB_RUN_GROUP"] == "theirs"
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == os.path.join("logs", "mine-round-3")
    assert os.environ["WANDB_RUN_GROUP"] == "theirs" and os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"
    assert wandb.finished == 0


def test_what_failed_leaves_no_run_open(wandb, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    with pytest.raises(KeyboardInterrupt), trackers.one_run("mine", "mine-round-1"):
        assert os.environ["WANDB_RUN_GROUP"] == "mine" and "TENSORBOARD_LOGGING_DIR" not in os.environ
        wandb.run = "open"
        raise KeyboardInterrupt
    assert wandb.finished == 1 and "WANDB_RUN_GROUP" not in os.environ


def test_names_given_in_the_settings(wandb, tiny_model_dir, prompts, tmp_path, monkeypatch):
    given = {"report_to": "wandb", "run_name": "sppo", "project": "reviews", "max_steps": 1}
    config = RoundsConfig(**settings(tiny_model_dir, prompts, tmp_path / "mine", training=given, rounds=1))
    IterativeDPO(config).run()
    assert [run[:3] for run in Tracker.runs] == [("sppo-round-1", "reviews", "sppo")]


def test_a_resumed_training_logs_its_round_once():
    logged = []
    callback = trackers.LogRound(types.SimpleNamespace(log=logged.append), {"round": 2, "pairs": 3})
    for step in (0, 5):
        callback.on_train_begin(None, types.SimpleNamespace(global_step=step), None)
    assert logged == [{"round/pairs": 3.0}]


@pytest.mark.parametrize("report_to", ["wandb", ["tensorboard", "wandb"]])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_sampled(
    report_to, tiny_model_dir, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    config = RoundsConfig(**settings(tiny_model_dir, prompts, tmp_path / "run", training={"report_to": report_to}))
    with pytest.raises(
        ValueError, match=r"`training` cannot be used: `report_to` names 'wandb', .* pip install wandb"
    ):
        IterativeDPO(config)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    IterativeDPO(config)
