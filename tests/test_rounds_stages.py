"""Single stages of the rounds: which model, which prompts, which pairs."""

import json
import random
import types

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import preference_rows
from tests.test_rounds import prompts_file, settings
from trl_ext.data.cache import content_key
from trl_ext.rounds import IterativeDPO, RoundsConfig, disk, iterate
from trl_ext.rounds.extrapolate import extrapolate
from trl_ext.rounds.replay import load_replay, mix_replay
from trl_ext.rounds.report import round_metrics, table
from trl_ext.rounds.shaping import balance_lengths, drop_truncated, text_length, without_empty


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

    monkeypatch.setattr(iterate, "DPOTrainer", Trainer)
    run = rounds(reference=reference, seed=7)
    policy = moved(tiny_model_dir, tmp_path / "policy", 3.0)
    folder = tmp_path / "run" / "round-2"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11"):
        (folder / "train" / name).mkdir(parents=True)
    for name in ("checkpoint-9", "checkpoint-10"):  # the third was being written when the run was killed
        (folder / "train" / name / "trainer_state.json").write_text("{}")
    pairs = Dataset.from_list(preference_rows(2))
    run._train(folder, policy, pairs)
    first = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    for name, value in first.items():
        torch.testing.assert_close(seen["model"].get_parameter(name), 3 * value)
        torch.testing.assert_close(seen["ref_model"].get_parameter(name), factor * value)
    assert seen["train_dataset"] is pairs and seen["args"].seed == 7
    assert seen["args"].output_dir == str(folder / "train") and seen["saved"] == str(folder / "model")
    assert seen["resumed"] == str(folder / "train" / "checkpoint-10")
    assert json.loads((folder / "log.json").read_text()) == [{"loss": 0.5}]
    assert seen["processing_class"] is run.tokenizer


def test_a_first_round_does_not_resume(rounds, tmp_path, monkeypatch):
    resumed = []

    def trainer(**kwargs):
        assert kwargs["args"].model_init_kwargs is None  # they were used to load the models
        assert {kwargs[name].dtype for name in ("model", "ref_model")} == {torch.bfloat16}
        state = types.SimpleNamespace(log_history=[])
        return types.SimpleNamespace(
            train=lambda resume_from_checkpoint: resumed.append(resume_from_checkpoint),
            save_model=lambda folder: None,
            state=state,
        )

    monkeypatch.setattr(iterate, "DPOTrainer", trainer)
    run = rounds(training={"model_init_kwargs": {"dtype": "bfloat16"}})
    run._train(tmp_path / "round-1", run.config.model, None)
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
    run = rounds(judge="implicit", implicit_reference=str(tiny_model_dir), scoring={"batch_size": 3})
    model = {number: str(tmp_path / "run" / f"round-{number}" / "model") for number in (1, 2)}
    for number in (1, 2, 3):
        run._score(number, run._policy(number - 1), None, tmp_path)
    expected = [(run.config.model, str(tiny_model_dir)), (model[1], run.config.model), (model[2], model[1])]
    assert seen == [(names, {"batch_size": 3}) for names in expected]


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
        lambda prompts, policy, n, **options: seen.update(prompts=prompts["prompt"], policy=policy, n=n, **options),
    )
    run = rounds(rows=5, prompts_per_round=size, seed=5)
    run._sample(number, "policy", tmp_path, of)
    all_prompts = [row["prompt"] for row in preference_rows(5)]
    assert seen["prompts"] == [all_prompts[index] for index in expected]
    assert (seen["policy"], seen["n"], seen["cache_dir"]) == ("policy", 3, tmp_path / "chunks")
    assert seen["seed"] == int(content_key(5, number), 16) % 2**31 and seen["max_new_tokens"] == 6


def test_what_the_template_reads_is_kept_and_nothing_else(rounds, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text(json.dumps({"prompt": "what", "tools": "[]", "chat_template_kwargs": {"a": 1}, "chosen": "x"}))
    assert rounds(prompts=str(path)).prompts.column_names == ["prompt", "tools", "chat_template_kwargs"]


# Which pairs

GROUPS = [
    {"prompt": "p", "completions": ["a", "bb", "ccc"], "scores": [0.0, 3.0, 1.0], "stop_reasons": ["stop"] * 3},
    {"prompt": "q", "completions": ["a", "bb", "ccc"], "scores": [1.0, 0.5, 1.5], "stop_reasons": ["stop", "stop", "length"]},
]  # fmt: skip


def pairs_of(run, folder):
    (folder / "run" / "round-1").mkdir(parents=True)
    return run._pair(1, Dataset.from_list(GROUPS))


def test_best_against_worst(rounds, tmp_path):
    pairs = pairs_of(rounds(), tmp_path)
    assert pairs.to_list() == [
        {"prompt": "p", "chosen": "bb", "rejected": "a", "score_chosen": 3.0, "score_rejected": 0.0},
        {"prompt": "q", "chosen": "ccc", "rejected": "bb", "score_chosen": 1.5, "score_rejected": 0.5},
    ]
    assert json.loads((tmp_path / "run" / "round-1" / "shaping.json").read_text()) == {"length_penalty": 0.0}


def test_margins_and_truncation(rounds, tmp_path):
    pairs = pairs_of(rounds(min_margin=1.0), tmp_path)
    assert pairs["chosen"] == ["bb", "ccc"]  # a margin of exactly 1 is kept
    with pytest.raises(ValueError, match=r"Round 1: no pair has a margin of `min_margin=3\.5`"):
        rounds(min_margin=3.5)._pair(1, Dataset.from_list(GROUPS))
    pairs = rounds(drop_truncated=True)._pair(1, Dataset.from_list(GROUPS))
    assert pairs["chosen"] == ["bb", "a"]


def test_whole_groups(rounds, tmp_path):
    run = rounds(pairing="group", training={"loss_type": "anchored"})
    assert run.args.pairing == "group"
    assert pairs_of(run, tmp_path).column_names == ["prompt", "completions", "scores"]


def test_lengths_balanced_before_pairing(rounds, tmp_path, monkeypatch):
    monkeypatch.setattr(
        iterate,
        "balance_lengths",
        lambda groups: (groups.remove_columns("scores").add_column("scores", [[2.0, 1.0, 0.0]] * 2), 0.25),
    )
    assert pairs_of(rounds(length_shaping="balance"), tmp_path)["chosen"] == ["a", "a"]
    assert json.loads((tmp_path / "run" / "round-1" / "shaping.json").read_text()) == {"length_penalty": 0.25}


def replay_file(folder, *columns, rows=20):
    path = folder / "replay.jsonl"
    names = ("prompt", "chosen", "rejected", *columns)
    path.write_text("\n".join(json.dumps({name: row[name] for name in names}) for row in preference_rows(rows)))
    return str(path)


def test_first_log_probs_are_of_the_first_policy_for_replayed_pairs_too(rounds, tmp_path, monkeypatch):
    seen = {}

    def fake(name, pairs, tokenizer, args, ld_alpha):
        seen.update(name=name, rows=pairs.to_list(), tokenizer=tokenizer, args=args, ld_alpha=ld_alpha)
        return [(float(index), -float(index)) for index in range(len(pairs))]

    monkeypatch.setattr(iterate, "pair_log_probs", fake)
    run = rounds(replay=replay_file(tmp_path), training={"loss_type": "inpo", "ld_alpha": 0.5, "max_length": 77})
    pairs = pairs_of(run, tmp_path)
    assert len(pairs) == 4 and {row["prompt"] for row in seen["rows"]} > {"p", "q"}
    assert pairs["initial_chosen_logps"] == [0.0, 1.0, 2.0, 3.0]
    assert pairs["initial_rejected_logps"] == [0.0, -1.0, -2.0, -3.0]
    assert seen["name"] == run.config.model and seen["tokenizer"] is run.tokenizer
    assert (seen["args"].max_length, seen["ld_alpha"]) == (77, 0.5)


def test_replayed_scores_reach_a_loss_that_may_read_them(rounds, tmp_path):
    """Without scores `anchored` would be another loss: no score column, no run."""
    with pytest.raises(ValueError, match=r"lacks the columns \['score_chosen', 'score_rejected'\]"):
        rounds(replay=replay_file(tmp_path), training={"loss_type": "anchored"})
    with pytest.raises(ValueError, match=r"lacks the columns \['score_rejected'\]"):
        rounds(replay=replay_file(tmp_path, "score_chosen"), training={"loss_type": ["sigmoid", "offset"]})
    run = rounds(replay=replay_file(tmp_path, "score_chosen", "score_rejected"), training={"loss_type": "anchored"})
    pairs = pairs_of(run, tmp_path)
    old = {row["chosen"]: row["score_chosen"] for row in preference_rows(20)}
    assert len(pairs) == 4
    for row in pairs:
        assert row["score_chosen"] == (
            old[row["chosen"]] if row["prompt"] not in ("p", "q") else {"bb": 3.0, "ccc": 1.5}[row["chosen"]]
        )


def test_texts_are_enough_for_a_loss_that_reads_texts(rounds, tmp_path):
    pairs = pairs_of(rounds(replay=replay_file(tmp_path), replay_share=0.75), tmp_path)
    assert pairs.column_names == ["prompt", "chosen", "rejected"] and len(pairs) == 8


@pytest.mark.parametrize(
    ("prompt", "row", "message"),
    [
        ("what", {"chosen": "a"}, r"lacks the columns \['prompt', 'rejected'\]"),
        ("what", {"prompt": "p", "chosen": "a", "rejected": "b", "tools": "[]"}, r"has the columns \['tools'\]"),
        ("what", {"prompt": [{"role": "user", "content": "p"}], "chosen": [], "rejected": []}, "both be messages"),
    ],
)
def test_replay_of_another_form_is_refused(prompt, row, message, tmp_path):
    path = tmp_path / "replay.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        load_replay(str(path), Dataset.from_list([{"prompt": prompt}]), [])


def test_replay_without_what_the_template_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lacks the columns \['tools'\]"):
        load_replay(replay_file(tmp_path), Dataset.from_list([{"prompt": "p", "tools": "[]"}]), [])


def test_replay_of_conversations_whose_prompt_is_not_split_off(tmp_path):
    """The form of the binarized UltraFeedback; its messages name their keys in another order."""
    turn = {"content": "hi", "role": "user"}
    sides = {side: [turn, {"content": side, "role": "assistant"}] for side in ("chosen", "rejected")}
    path = tmp_path / "replay.jsonl"
    path.write_text(json.dumps(sides))
    message = {"role": "user", "content": "what"}
    old = load_replay(str(path), Dataset.from_list([{"prompt": [message]}]), [])
    new = Dataset.from_list([{"prompt": [message], "chosen": [message], "rejected": [message]}])
    mixed = mix_replay(new, old, 0.5, seed=0)
    assert sorted(row["chosen"][0]["content"] for row in mixed) == ["chosen", "what"]


def test_replay():
    columns = ("prompt", "chosen", "rejected")
    data = Dataset.from_list([{k: row[k] for k in columns} for row in preference_rows(20)])
    new = data.select(range(6)).add_column("score_chosen", [1.0] * 6)
    old = data.select(range(6, 20))
    mixed = mix_replay(new, old, 0.5, seed=0)
    fresh = new.select_columns(list(columns)).to_list()
    assert len(mixed) == 12 and sum(row in fresh for row in mixed) == 6
    assert len({row["chosen"] for row in mixed}) == 12  # none is drawn twice
    assert mixed.to_list() != mix_replay(new, old, 0.5, seed=1).to_list()
    assert any(row in fresh for row in mixed.select(range(6, 12)))  # shuffled
    assert len(mix_replay(new, old, 0.7, seed=0)) == 20  # 6 * 7 / 3 = 14: all there are
    with pytest.raises(ValueError, match="needs 18 pairs to replay, and there are 14"):
        mix_replay(new, old, 0.75, seed=0)


def test_only_completions_with_text_are_judged(rounds, tmp_path, monkeypatch):
    run = rounds()
    samples = [
        {"prompt": "p", "completions": ["a", "", "bb"], "stop_reasons": ["stop", "stop", "length"]},
        {"prompt": "q", "completions": ["", "bb"], "stop_reasons": ["stop", "stop"]},
    ]
    scored = run._score(1, "policy", Dataset.from_list(samples), tmp_path)
    assert scored.to_list() == [
        {"prompt": "p", "completions": ["a", "bb"], "stop_reasons": ["stop", "length"], "scores": [1.0, 2.0]}
    ]
    assert list((tmp_path / "scores").iterdir())
    with pytest.raises(ValueError, match="Round 3: no prompt has two completions"):
        run._score(3, "policy", Dataset.from_list(samples[1:]), tmp_path)


# Shaping


def test_lengths_are_balanced():
    rng = random.Random(0)
    rows = []
    for i in range(40):
        completions = ["x" * rng.randint(10, 200) for _ in range(6)]
        scores = [0.05 * len(c) + rng.gauss(0, 3) for c in completions]
        rows.append({"prompt": str(i), "completions": completions, "scores": scores})
    groups = Dataset.from_list(rows)
    shaped, penalty = balance_lengths(groups)

    def gap(data):
        total = 0
        for row in data:
            best, worst = (row["scores"].index(f(row["scores"])) for f in (max, min))
            total += len(row["completions"][best]) - len(row["completions"][worst])
        return abs(total) / len(data)

    assert gap(shaped) < gap(groups) / 5 and 0.02 < penalty < 0.1
    assert shaped[0]["scores"] == pytest.approx(
        [s - penalty * len(c) for s, c in zip(rows[0]["scores"], rows[0]["completions"], strict=True)]
    )


def test_penalties_by_hand_and_the_smallest_of_equal_ones():
    rows = [
        {"completions": ["aaaa", "bb"], "scores": [2.0, 1.0]},
        {"completions": ["c", "ccc", "ccccc"], "scores": [0.0, 0.5, 1.0]},
    ]
    # The chosen are longer by (2 + 4) / 2 up to 0.25, where the second group ties: 2. At 0.5 the first one ties: -4.
    shaped, penalty = balance_lengths(Dataset.from_list(rows), step=0.25, largest=1.0)
    assert penalty == 0.25 and shaped["scores"] == [[1.0, 0.5], [-0.25, -0.25, -0.25]]
    shaped, penalty = balance_lengths(Dataset.from_list(rows), step=0.0625, largest=0.1875)
    assert penalty == 0.0 and shaped["scores"] == [[2.0, 1.0], [0.0, 0.5, 1.0]]
    with pytest.raises(ValueError, match=r"`step=0` must be positive"):
        balance_lengths(Dataset.from_list(rows), step=0)
    with pytest.raises(ValueError, match=r"`largest=0\.1` no smaller"):
        balance_lengths(Dataset.from_list(rows), step=0.2, largest=0.1)


def test_the_last_step_is_tried():
    rows = [{"completions": ["aaa", "b"], "scores": [1.0, 0.0]}, {"completions": ["aaaaa", "b"], "scores": [2.9, 0.0]}]
    # Gaps: 3 up to 0.5; -2 + 4 = 2 / 2 = 1 from there to 0.725
    assert balance_lengths(Dataset.from_list(rows), step=0.6, largest=0.6)[1] == 0.6


def test_truncated_completions_are_dropped():
    rows = [{"prompt": "p", "completions": ["a", "b", "c"], "scores": [1.0, 2.0, 3.0], "stop_reasons": ["stop", "length", "stop"]},
            {"prompt": "q", "completions": ["a", "b"], "scores": [1.0, 2.0], "stop_reasons": ["stop", "length"]}]  # fmt: skip
    (kept,) = drop_truncated(Dataset.from_list(rows))
    assert kept["completions"] == ["a", "c"] and kept["scores"] == [1.0, 3.0]
    with pytest.raises(ValueError, match="drop_truncated"):
        drop_truncated(Dataset.from_list(rows[1:]))


def test_length_of_a_text():
    assert text_length("four") == 4
    assert text_length([{"content": "four"}, {"content": None}, {"role": "tool", "content": "abc"}]) == 7
    empty = without_empty({"completions": ["", [{"content": ""}], "x"], "stop_reasons": ["a", "b", "c"]})
    assert empty == {"completions": ["x"], "stop_reasons": ["c"]}


# Weights between rounds, metrics, disk


def test_extrapolation_by_hand(tiny_model_dir, tmp_path):
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    trained = moved(tiny_model_dir, tmp_path / "trained", 2.0)
    extrapolate(trained, tiny_model_dir, 0.5, tmp_path / "out")
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        torch.testing.assert_close(value, 2.5 * before[name])


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
        "round": 3, "prompts": 2, "mean_score": 2.0, "mean_length": 2.0, "truncated": 0.25, "pairs": 2, "length_penalty": 0.5,
        "length_gap": -0.5,
    }  # fmt: skip
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    after = round_metrics(4, tmp_path, samples, scored)
    assert "pairs" not in after and after["mean_score"] == 2.0
    shown = table([metrics, after])
    assert [column.header.split("\n")[0] for column in shown.columns] == [
        "round", "score", "length", "truncated", "pairs", "chosen longer", "length",
    ]  # fmt: skip
    assert [list(column.cells) for column in shown.columns][1] == ["2.000", "2.000"]
    assert [list(column.cells) for column in shown.columns][4] == ["2", ""]


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
