"""Pairs of scored completions, by hand."""

import pytest
import torch
from datasets import Dataset

from trl_ext.data.groups import from_groups
from trl_ext.data.pairing import pair_up
from trl_ext.data.sampling import pair_traces


SCORES = torch.tensor([[2.0, 5.0, 2.0, 9.0], [1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 7.0, 7.0], [4.0, 0.0, 0.0, 0.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0]]).bool()


def triples(*args, **kwargs):
    pairs = pair_up(*args, **kwargs)
    return list(zip(pairs.group.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))


def test_best_against_worst():
    """What is masked takes no part; of equal ones the first is best and the last is worst; one alone is no pair."""
    assert triples(SCORES, MASK) == [(0, 1, 2), (2, 2, 0)]
    assert triples(SCORES, MASK, keep_ties=True) == [(0, 1, 2), (1, 0, 1), (2, 2, 0)]


def test_each_two():
    assert triples(SCORES, MASK, "all") == [(0, 1, 0), (0, 1, 2), (2, 2, 0), (2, 3, 0)]
    # Of two equal ones the first stands as chosen, once
    assert triples(SCORES, MASK, "all", keep_ties=True) == [
        (0, 0, 2), (0, 1, 0), (0, 1, 2), (1, 0, 1), (2, 2, 0), (2, 2, 3), (2, 3, 0),
    ]  # fmt: skip


def test_probabilities_decide_in_place_of_scores():
    scores, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3).bool()
    wins = torch.tensor([[[0.5, 0.9, 0.5], [0.1, 0.5, 0.4], [0.5, 0.6, 0.5]]])
    assert triples(scores, mask, "all", probabilities=wins) == [(0, 0, 1), (0, 2, 1)]
    assert triples(scores, mask, "all", probabilities=wins, keep_ties=True) == [(0, 0, 1), (0, 0, 2), (0, 2, 1)]
    assert triples(scores, mask, probabilities=wins) == [(0, 2, 0)]


def test_whole_groups_are_no_pairs():
    with pytest.raises(ValueError, match=r"`pairing='group'` makes no pairs; use one of \('best_worst', 'all'\)"):
        pair_up(SCORES, MASK, "group")


def test_scores_that_float32_cannot_tell_apart():
    rows = Dataset.from_list([{"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 1.0 + 1e-12]}])
    for pairing in ("best_worst", "all", "group"):
        assert from_groups(rows, pairing, "train")["chosen"] == ["b"]
    (row,) = pair_traces(rows, rows)
    assert (row["chosen"], row["rejected"], row["chosen_empty_trace"], row["rejected_empty_trace"]) == (
        "b",
        "a",
        "b",
        "a",
    )


GROUPS = [
    {"prompt": "p", "tools": "[]", "extra": 1, "completions": list("abcde"), "scores": [3, 1, 4, 1, 5]},
    {"prompt": "q", "tools": "[]", "extra": 2, "completions": list("fgh"), "scores": [0, 2, 1]},
    {"prompt": "r", "tools": "[]", "extra": 3, "completions": list("ij"), "scores": [1, 0]},
]


def whole():
    return from_groups(Dataset.from_list(GROUPS), "group", "train")


def two(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


def test_whole_groups_by_hand():
    """Beside best and worst the others in twos, the last of an odd number twice; scores of best, worst and the others."""
    first, second, third = whole()
    assert first == {
        "prompt": "p", "tools": "[]", "extra": 1, "chosen": "e", "rejected": "d", "score_chosen": 5.0, "score_rejected": 1.0,
        "other_completions": [two("a", "b"), two("c", "c")], "group_scores": [5.0, 1.0, 3.0, 1.0, 4.0],
    }  # fmt: skip
    assert (second["chosen"], second["rejected"], second["other_completions"]) == ("g", "f", [two("h", "h")])
    assert second["group_scores"] == [2.0, 0.0, 1.0]
    assert (third["chosen"], third["rejected"], third["other_completions"], third["group_scores"]) == (
        "i",
        "j",
        [],
        [1.0, 0.0],
    )


def test_log_probs_of_the_policy_that_sampled_go_along():
    """In the order of the scores: best, worst, the others as they come."""
    given = [[-0.1, -0.2, -0.3, -0.4, -0.5], [-1.1, -1.2, -1.3], [-2.1, -2.2]]
    rows = [{**row, "behaviour_logps": logps} for row, logps in zip(GROUPS, given, strict=True)]
    found = from_groups(Dataset.from_list(rows), "group", "train")
    assert found["behaviour_logps"][:] == [[-0.5, -0.4, -0.1, -0.2, -0.3], [-1.2, -1.1, -1.3], [-2.1, -2.2]]
    # What is made into pairs has none
    assert "behaviour_logps" not in from_groups(Dataset.from_list(rows), "all", "train").column_names
