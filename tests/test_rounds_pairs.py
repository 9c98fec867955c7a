# ruff: noqa: F401, F811 -- fixtures are imported and then named as arguments
"""From scored completions to the pairs of a round: margins, lengths, replay."""

import json
import random

import pytest
from datasets import Dataset

from tests.conftest import preference_rows
from tests.test_rounds_stages import GROUPS, rounds
from trl_ext.rounds import iterate
from trl_ext.rounds.replay import load_replay, mix_replay
from trl_ext.rounds.shaping import balance_lengths, drop_truncated, text_length, without_empty


# Which pairs


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


def test_each_round_draws_other_pairs_to_replay(rounds, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(iterate, "mix_replay", lambda pairs, *args: asked.append(args) or pairs)
    run = rounds(replay=replay_file(tmp_path), replay_share=0.25, seed=10)
    pairs_of(run, tmp_path)
    (tmp_path / "run" / "round-2").mkdir()
    run._pair(2, Dataset.from_list(GROUPS))
    assert asked == [(run.replay, 0.25, 11), (run.replay, 0.25, 12)]


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


def test_replay_of_lists_of_scores_is_refused(tmp_path):
    path = tmp_path / "replay.jsonl"
    path.write_text(
        json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": [1.0], "score_rejected": 0.0})
    )
    with pytest.raises(
        ValueError, match=r"has lists of scores in \['score_chosen'\], and rounds keep one score per completion"
    ):
        load_replay(str(path), Dataset.from_list([{"prompt": "q"}]), ["score_chosen", "score_rejected"])


def test_replay_that_cannot_be_read(tmp_path):
    (tmp_path / "replay.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^`replay`: Cannot read .*the file is empty"):
        load_replay(str(tmp_path / "replay.jsonl"), Dataset.from_list([{"prompt": "q"}]), [])


def test_weights_of_replayed_pairs_are_not_used(tmp_path, caplog):
    path = tmp_path / "replay.jsonl"
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.0}
    for columns, said in (({"weight": 2.0}, True), ({"other": 2.0}, False)):
        caplog.clear()
        path.write_text(json.dumps({**row, **columns}))
        with caplog.at_level("WARNING"):
            data = load_replay(str(path), Dataset.from_list([{"prompt": "q"}]), ["score_chosen"])
        assert data.to_list() == [row] and ("The column 'weight' of" in caplog.text) is said


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
    drawn = [{row["chosen"] for row in mix_replay(new, old, 0.5, seed)} for seed in (0, 1)]
    assert drawn[0] != drawn[1] != set(new["chosen"]) | set(old["chosen"][:6])
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


def test_penalties_up_to_one_by_default():
    rows = [{"completions": ["aaa", "b"], "scores": [2.4, 0.0]}, {"completions": ["aaaaa", "b"], "scores": [9.0, 0.0]}]
    # Gaps: (2 + 4) / 2 = 3 up to 1.2; only from there (-2 + 4) / 2 = 1
    assert balance_lengths(Dataset.from_list(rows))[1] == 0.0
    assert balance_lengths(Dataset.from_list(rows), largest=1.5)[1] == pytest.approx(1.201)


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
