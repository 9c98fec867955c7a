"""Pairs of scored completions, by hand."""

import pytest
import torch
from datasets import Dataset

from trl_ext.data.groups import OTHER_SCORES, flatten_others, from_groups, gather_others
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


def test_whole_groups_by_hand():
    first, second, third = whole()
    assert first == {
        "prompt": "p", "tools": "[]", "extra": 1, "chosen": "e", "rejected": "d", "score_chosen": 5.0, "score_rejected": 1.0,
        "other_completions": ["a", "b", "c"], "other_scores": [3.0, 1.0, 4.0],
    }  # fmt: skip
    assert (second["chosen"], second["rejected"], second["other_completions"]) == ("g", "f", ["h"])
    assert (third["chosen"], third["rejected"], third["other_completions"], third["other_scores"]) == (
        "i",
        "j",
        [],
        [],
    )


def test_others_in_twos_and_back():
    """Three as two pairs whose last one stands twice, one as a pair with itself, none as none."""
    flat, starts = flatten_others(whole())
    row = lambda prompt, chosen, rejected: {"prompt": prompt, "tools": "[]", "chosen": chosen, "rejected": rejected}  # noqa: E731
    assert starts == [0, 2, 3, 3]
    assert flat.to_list() == [row("p", "a", "b"), row("p", "c", "c"), row("q", "h", "h")]
    known = {name: number for number, name in enumerate("abcdefgh")}
    flat = flat.map(lambda row: {"one": known[row["chosen"]], "two": known[row["rejected"]]})
    back = gather_others(whole(), flat, starts, {"number": ("one", "two"), "twice": ("two", "two")})
    assert back["number"] == [[0, 1, 2], [7], []] and back["twice"] == [[1, 1, 2], [7], []]
    assert back["chosen"] == ["e", "g", "i"]


def test_others_that_are_token_ids():
    rows = [
        {"other_prompt_ids": [[1], [2], [3]], "other_ids": [[4], [5], [6]], OTHER_SCORES: [0.0] * 3},
        {"other_prompt_ids": [[7], [8]], "other_ids": [[9], [10]], OTHER_SCORES: [0.0] * 2},
    ]
    flat, starts = flatten_others(Dataset.from_list(rows))
    assert starts == [0, 2, 3] and flat.to_list() == [
        {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [5]},
        {"prompt_ids": [3], "chosen_ids": [6], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [9], "rejected_ids": [10]},
    ]
