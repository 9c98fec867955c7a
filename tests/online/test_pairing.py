"""Pairs from scores, for offline groups and online training alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.data.pairing import pair_up


def listed(pairs):
    return list(zip(pairs.group.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))


SCORES = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, 0.0, 4.0]])
ALL = torch.ones(3, 3, dtype=torch.bool)


def test_best_against_worst():
    assert listed(pair_up(SCORES, ALL)) == [(0, 1, 0), (2, 2, 1)]


def test_all_ordered_pairs():
    assert listed(pair_up(SCORES, ALL, "all")) == [(0, 1, 0), (0, 1, 2), (0, 2, 0), (2, 2, 0), (2, 2, 1)]


def test_unscored_completions_form_no_pair():
    mask = torch.tensor([[True, False, True], [True, True, True], [True, True, False]])
    assert listed(pair_up(SCORES, mask)) == [(0, 2, 0)]
    assert listed(pair_up(SCORES, mask, "all")) == [(0, 2, 0)]
    assert listed(pair_up(SCORES, torch.eye(3, dtype=torch.bool))) == []


def test_kept_ties_are_two_different_completions():
    assert listed(pair_up(SCORES, ALL, keep_ties=True)) == [(0, 1, 0), (1, 0, 2), (2, 2, 1)]
    assert (1, 0, 1) in listed(pair_up(SCORES, ALL, "all", keep_ties=True))


def test_probabilities_order_pairs():
    # A beats B, B beats C, C beats A: no ranking, but three preferences
    p = torch.tensor([[[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]]])
    assert listed(pair_up(torch.zeros(1, 3), ALL[:1], "all", p)) == [(0, 0, 1), (0, 1, 2), (0, 2, 0)]


def test_a_group_makes_no_pairs():
    with pytest.raises(ValueError, match="makes no pairs"):
        pair_up(SCORES, ALL, "group")


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(["best_worst", "all"]),
)
def test_the_chosen_scores_more(rows, pairing):
    scores = torch.tensor(rows, dtype=torch.float32)
    pairs = pair_up(scores, torch.ones_like(scores, dtype=torch.bool), pairing)
    assert (scores[pairs.group, pairs.chosen] > scores[pairs.group, pairs.rejected]).all()
    assert set(pairs.group.tolist()) == {i for i, row in enumerate(rows) if len(set(row)) > 1}
