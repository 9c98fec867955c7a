"""Single stages of the rounds: which model, which prompts, which pairs."""

import json
import shutil
import types

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config

from tests.conftest import preference_rows
from tests.test_rounds import longer, prompts_file, settings
from trl_ext.data.cache import content_key
from trl_ext.data.rewards import JudgeFunction
from trl_ext.rounds import IterativeDPO, RoundsConfig, disk, iterate
from trl_ext.rounds.extrapolate import extrapolate
from trl_ext.rounds.report import round_metrics, table


GROUPS = [
    {"prompt": "p", "completions": ["a", "bb", "ccc"], "scores": [0.0, 3.0, 1.0], "stop_reasons": ["stop"] * 3},
    {"prompt": "q", "completions": ["a", "bb", "ccc"], "scores": [1.0, 0.5, 1.5], "stop_reasons": ["stop", "stop", "length"]},
]  # fmt: skip


@pytest.fixture
def rounds(tiny_model_dir, tmp_path):
    """Rounds with settings of choice, of which no stage has run."""

    def make(rows=4, **overrides):
        path = overrides.pop("prompts", None) or prompts_file(tmp_path, rows)
        return IterativeDPO(RoundsConfig(**settings(tiny_model_dir, path, tmp_path / "run", **overrides)))

    return make


def moved(model_dir, folder, factor):
    """The model with all weights multiplied."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(factor)
    model.save_pretrained(folder)
    return str(folder)


# Which model


@pytest.mark.parametrize(("reference", "factor"), [("reset", 3.0), ("keep", 1.0)])
def test_the_reference_is_the_first_policy_or_that_of_the_round(
    reference, factor, rounds, tiny_model_dir, tmp_path, monkeypatch
):
    seen = {}

    class Trainer:
        state = types.SimpleNamespace(log_history=[{"loss": 0.5}])

        def __init__(self, **kwargs):
            seen.update(kwargs)

        def train(self, resume_from_checkpoint):
            seen["resumed"] = resume_from_checkpoint

        def save_model(self, folder):
            seen["saved"] = folder

        def add_callback(self, callback):
            seen["callback"] = callback

    monkeypatch.setattr(iterate, "DPOTrainer", Trainer)
    run = rounds(reference=reference, seed=7)
    policy = moved(tiny_model_dir, tmp_path / "policy", 3.0)
    folder = tmp_path / "run" / "round-2"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11"):
        (folder / "train" / name).mkdir(parents=True)
    for name in ("checkpoint-9", "checkpoint-10"):  # the third was being written when the run was killed
        (folder / "train" / name / "trainer_state.json").write_text('{"global_step": 9}')
    pairs = Dataset.from_list(preference_rows(2))
    run._train(folder, policy, pairs, {"round": 2, "mean_score": 1.5})
    first = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    for name, value in first.items():
        torch.testing.assert_close(seen["model"].get_parameter(name), 3 * value)
        torch.testing.assert_close(seen["ref_model"].get_parameter(name), factor * value)
    assert seen["train_dataset"] is pairs and seen["args"].seed == 7
    assert seen["args"].output_dir == str(folder / "train") and seen["saved"] == str(folder / "model")
    assert seen["resumed"] == str(folder / "train" / "checkpoint-10")
    assert json.loads((folder / "log.json").read_text()) == [{"loss": 0.5}]
    assert seen["processing_class"] is run.tokenizer
    assert seen["args"].run_name == "run-round-2" and seen["callback"].metrics == {"round/mean_score": 1.5}


def test_a_first_round_does_not_resume(rounds, tmp_path, monkeypatch):
    resumed = []

    def trainer(**kwargs):
        assert kwargs["args"].model_init_kwargs is None  # they were used to load the models
        assert {kwargs[name].dtype for name in ("model", "ref_model")} == {torch.bfloat16}
        state = types.SimpleNamespace(log_history=[])
        return types.SimpleNamespace(
            train=lambda resume_from_checkpoint: resumed.append(resume_from_checkpoint),
            save_model=lambda folder: None,
            add_callback=lambda callback: None,
            state=state,
        )

    monkeypatch.setattr(iterate, "DPOTrainer", trainer)
    run = rounds(training={"model_init_kwargs": {"dtype": "bfloat16"}})
    run._train(tmp_path / "round-1", run.config.model, None, {"round": 1})
    assert resumed == [None]


def test_the_policy_of_a_round(rounds, tmp_path):
    run = rounds()
    assert run._policy(0) == run.config.model
    assert run._policy(2) == str(tmp_path / "run" / "round-2" / "model")
    (tmp_path / "run" / "round-2" / "policy").mkdir(parents=True)
    assert run._policy(2) == str(tmp_path / "run" / "round-2" / "policy")


def test_the_implicit_reference_is_the_policy_of_the_round_before(rounds, tmp_path, tiny_model_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(iterate, "implicit_rewards", lambda *args, **options: seen.append((args[1:3], options)))
    run = rounds(reward_funcs="implicit", implicit_reference=str(tiny_model_dir), scoring={"batch_size": 3})
    model = {number: str(tmp_path / "run" / f"round-{number}" / "model") for number in (1, 2)}
    for number in (1, 2, 3):
        run._score(number, run._policy(number - 1), None, tmp_path)
    expected = [(run.config.model, str(tiny_model_dir)), (model[1], run.config.model), (model[2], model[1])]
    assert seen == [(names, {"batch_size": 3}) for names in expected]


def test_the_stages_in_their_order(rounds, tmp_path, monkeypatch):
    """Who samples, who judges, what is trained and what is gone beyond, in three rounds and after the last."""
    calls, folder = [], tmp_path / "run"
    groups = Dataset.from_list(GROUPS)

    def train(self, where, policy, pairs, metrics):
        calls.append(("train", where.name, policy, len(pairs)))
        assert where.name == f"round-{metrics['round']}"
        (where / "model").mkdir()
        (where / "log.json").write_text("[]")

    def go_beyond(self, where, before):
        calls.append(("go beyond", where.name, str(before)))
        (where / "policy").mkdir()

    monkeypatch.setattr(IterativeDPO, "_sample", lambda self, *args: calls.append(("sample", *args)) or groups)
    monkeypatch.setattr(
        IterativeDPO,
        "_score",
        lambda self, number, policy, data, where: calls.append(("score", number, policy, len(data), where)) or data,
    )
    monkeypatch.setattr(IterativeDPO, "_train", train)
    monkeypatch.setattr(IterativeDPO, "_extrapolate", go_beyond)
    run = rounds(rounds=3, extrapolation=0.5)
    metrics = run.run()
    assert [row["round"] for row in metrics] == [1, 2, 3, 4] and ["pairs" in row for row in metrics] == [True] * 3 + [
        False
    ]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    first, model, policies = (
        run.config.model,
        str(folder / "round-1" / "model"),
        [str(folder / f"round-{n}" / "policy") for n in (2, 3)],
    )
    r1, r2, r3, after = (folder / name for name in ("round-1", "round-2", "round-3", "after-round-3"))
    assert calls == [
        ("sample", 1, first, r1, None), ("score", 1, first, 2, r1), ("train", "round-1", first, 2),
        ("sample", 2, model, r2, None), ("score", 2, model, 2, r2), ("train", "round-2", model, 2), ("go beyond", "round-2", model),
        ("sample", 3, policies[0], r3, None), ("score", 3, policies[0], 2, r3), ("train", "round-3", policies[0], 2),
        ("go beyond", "round-3", str(r2 / "model")),
        ("sample", 4, policies[1], after, 3), ("score", 4, policies[1], 2, after),
    ]  # fmt: skip
    # What a killed run goes on from, and what other tools read
    done = {path.name: sorted(each.stem for each in path.glob("*.done")) for path in (r1, r2, after)}
    stages = ["model", "pairs", "samples", "scored"]
    assert done == {"round-1": stages, "round-2": sorted([*stages, "policy"]), "after-round-3": ["samples", "scored"]}
    calls.clear()
    assert run.run() == metrics and not calls  # all is done
    with pytest.raises(ValueError, match=r"other settings: \['seed'\] differ"):
        rounds(rounds=3, extrapolation=0.5, seed=1).run()
    rounds(rounds=4, extrapolation=0.5).run()
    assert calls[:2] == [
        ("sample", 4, policies[1], folder / "round-4", None),
        ("score", 4, policies[1], 2, folder / "round-4"),
    ]


# Which prompts


@pytest.mark.parametrize(
    ("size", "number", "of", "expected"),
    [
        (None, 2, None, [0, 1, 2, 3, 4]),
        (2, 1, None, [0, 1]),
        (2, 2, None, [2, 3]),
        (2, 3, None, [4, 0]),  # anew from the start
        (2, 3, 2, [2, 3]),  # after the last round: that round's prompts
        (7, 1, None, [0, 1, 2, 3, 4, 0, 1]),
    ],
)
def test_prompts_are_taken_in_turn(size, number, of, expected, rounds, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        iterate,
        "sample_completions",
        lambda prompts, policy, n, **options: seen.update(
            prompts=prompts["prompt"], policy=policy, num_generations=n, **options
        ),
    )
    run = rounds(rows=5, prompts_per_round=size, seed=5)
    run._sample(number, "policy", tmp_path, of)
    all_prompts = [row["prompt"] for row in preference_rows(5)]
    assert seen["prompts"] == [all_prompts[index] for index in expected]
    assert (seen["policy"], seen["num_generations"], seen["cache_dir"]) == ("policy", 3, tmp_path / "chunks")
    assert seen["seed"] == int(content_key(5, number), 16) % 2**31 and seen["max_new_tokens"] == 6


def test_what_the_template_reads_is_kept_and_nothing_else(rounds, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text(json.dumps({"prompt": "what", "tools": "[]", "chat_template_kwargs": {"a": 1}, "chosen": "x"}))
    assert rounds(prompts=str(path)).prompts.column_names == ["prompt", "tools", "chat_template_kwargs"]


# Weights between rounds, metrics, disk


def test_extrapolation_by_hand(tiny_model_dir, tmp_path):
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    trained = moved(tiny_model_dir, tmp_path / "trained", 2.0)
    extrapolate(trained, tiny_model_dir, 0.5, tmp_path / "out")
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        torch.testing.assert_close(value, 2.5 * before[name])


def test_extrapolation_keeps_the_precision_and_needs_the_same_parameters(tiny_model_dir, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    before.save_pretrained(tmp_path / "before")
    extrapolate(moved(tmp_path / "before", tmp_path / "trained", 2.0), tmp_path / "before", 1.0, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in before.named_parameters():
        assert saved[name].dtype == torch.bfloat16 and torch.equal(saved[name], 3 * value)
    config = before.config
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "shorter")
    with pytest.raises(ValueError, match=r"have different parameters: \['model\.layers\.1\."):
        extrapolate(tmp_path / "trained", tmp_path / "shorter", 1.0, tmp_path / "other")


def test_an_extrapolated_policy_has_its_tokenizer(rounds, tiny_model_dir, tmp_path):
    run = rounds(extrapolation=1.0)
    folder = tmp_path / "round-2"
    moved(tiny_model_dir, folder / "model", 3.0)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder / "model")
    run._extrapolate(folder, tiny_model_dir)
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    for name, value in AutoModelForCausalLM.from_pretrained(folder / "policy").named_parameters():
        torch.testing.assert_close(value, 5 * before[name])  # 3 + 1 * (3 - 1)
    assert AutoTokenizer.from_pretrained(folder / "policy").eos_token == "<|eos|>"


def test_metrics_by_hand(tmp_path):
    samples = Dataset.from_list(
        [
            {"completions": ["a", "bbb"], "stop_reasons": ["stop", "length"]},
            {"completions": ["", "cccc"], "stop_reasons": ["stop", "stop"]},
        ]
    )
    scored = Dataset.from_list([{"scores": [1.0, 4.0]}, {"scores": [1.0]}])
    pairs = Dataset.from_list([{"chosen": "bbb", "rejected": "a"}, {"chosen": "c", "rejected": "dddd"}])
    (tmp_path / "shaping.json").write_text('{"length_penalty": 0.5}')
    metrics = round_metrics(3, tmp_path, samples, scored, pairs)
    assert metrics == {
        "round": 3, "prompts": 2, "mean_score": 2.0, "mean_length": 2.0, "truncated": 0.25, "tied": 0.5, "pairs": 2,
        "length_penalty": 0.5, "length_gap": -0.5,
    }  # fmt: skip
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    after = round_metrics(4, tmp_path, samples, scored)
    assert "pairs" not in after and after["mean_score"] == 2.0
    shown = table([metrics, after])
    assert [column.header.split("\n")[0] for column in shown.columns] == [
        "round", "score", "length", "truncated", "tied", "pairs", "chosen longer", "length",
    ]  # fmt: skip
    assert [list(column.cells) for column in shown.columns][1] == ["2.000", "2.000"]
    assert [list(column.cells) for column in shown.columns][5] == ["2", ""] and shown.caption is None


def test_a_folder_of_the_users_is_not_removed(tmp_path):
    target = tmp_path / "samples"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="was not made by these rounds"):
        disk.stage(target, lambda: pytest.fail("worked"))
    assert (target / "thesis.txt").read_text() == "years of work"


def test_a_stage_is_begun_and_done_once(tmp_path):
    target, calls = tmp_path / "model", []

    def work(fail):
        calls.append(sorted(path.name for path in tmp_path.iterdir()))
        target.mkdir()
        (target / str(len(calls))).write_text("")
        if fail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.stage(target, lambda: work(True))
    disk.stage(target, lambda: work(False))
    disk.stage(target, lambda: work(False))
    # marked before its folder, which is removed before it is made anew
    assert calls == [["model.begun"], ["model.begun"]]
    assert [path.name for path in target.iterdir()] == ["2"] and (tmp_path / "model.done").exists()


def test_functions_are_known_by_name_in_the_next_run(tmp_path):
    disk.claim(tmp_path, {"judge": longer, "num_generations": 3})
    disk.claim(tmp_path, {"judge": longer, "num_generations": 3})
    assert json.loads((tmp_path / "settings.json").read_text()) == {
        "judge": "tests.test_rounds:longer",
        "num_generations": 3,
    }
    for changed in (
        {"judge": prompts_file, "num_generations": 3},
        {"judge": JudgeFunction(longer), "num_generations": 3},
    ):
        with pytest.raises(ValueError, match=r"other settings: \['judge'\] differ"):
            disk.claim(tmp_path, changed)
    assert disk._lasting(JudgeFunction(longer)) == "trl_ext.data.rewards:JudgeFunction"


def test_zero3_is_of_training_alone(rounds, tiny_model_dir, monkeypatch):
    """While it is on, transformers loads models in parts, and what samples and scores has no engine that would put them together."""
    config, seen = type("Zero3", (), {"is_zero3": lambda self: True})(), []
    arguments, sample = IterativeDPO._training_arguments, iterate.sample_completions

    def turned_on(*args, **named):
        set_hf_deepspeed_config(config)
        return arguments(*args, **named)

    def sampled(*args, **kwargs):
        seen.append(("sample", is_deepspeed_zero3_enabled()))
        return sample(*args, **kwargs)

    def learn(self, folder, *args):
        seen.append(("train", is_deepspeed_zero3_enabled()))
        shutil.copytree(tiny_model_dir, folder / "model")
        (folder / "log.json").write_text("[]")

    monkeypatch.setattr(IterativeDPO, "_training_arguments", turned_on)
    monkeypatch.setattr(IterativeDPO, "_learn", learn)
    monkeypatch.setattr(iterate, "sample_completions", sampled)
    rounds().run()
    assert seen == [("sample", False), ("train", True)] * 2 + [("sample", False)]
