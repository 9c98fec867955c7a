"""From scored completions to the table that is learnt from, by hand."""

import pytest
import torch

from trl_ext.generation import Completions
from trl_ext.trainers.online.rewards import Scores
from trl_ext.trainers.online.selection import Selection, build_table, select


def completions(b, k, first=10):
    """Completion `n` is the token `first + n` and, for every other one, a second; prompt `p` is twice the token `p`."""
    return Completions(
        prompts=[f"p{i}" for i in range(b)],
        texts=["t"] * (b * k),
        prompt_ids=[torch.tensor([i, i]) for i in range(b)],
        ids=[torch.tensor([first + n] * (1 + n % 2)) for n in range(b * k)],
        ended=torch.ones(b * k, dtype=torch.bool),
    )


def shown(rows):
    """The tokens of each row, with those that are scored after a bar."""
    ids, mask = rows.inputs["input_ids"], rows.inputs["attention_mask"].bool()
    return [
        (row[kept & ~scored.bool()].tolist(), row[kept & scored.bool()].tolist())
        for row, kept, scored in zip(ids, mask, rows.completion_mask, strict=True)
    ]


def test_only_what_is_learnt_from_has_a_row():
    """Three prompts, of which the second ties; completion k of prompt b is number 3 k + b."""
    made = completions(3, 3)
    selection = select(made, Scores(torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 2.0], [4.0, 0.0, 4.0]])), "best_worst")
    assert selection.pairs.tolist() == [[3, 0], [2, 5]] and selection.groups is None
    assert selection.prompts.tolist() == [0, 2] and selection.members.tolist() == [0, 2, 3, 5]
    rows, plan, (place,) = build_table([selection], {"level": torch.tensor([7.0, 8.0, 9.0])}, 99, 0)
    assert shown(rows) == [([0, 0], [10]), ([2, 2], [12]), ([0, 0], [13, 13]), ([2, 2], [15, 15])]
    assert rows.prompt.tolist() == [0, 2, 0, 2]
    assert place.tolist() == [0, -1, 1, 2, -1, 3, -1, -1, -1]
    assert plan.pairs.tolist() == [[2, 0], [1, 3]] and plan.count == 3 and plan.share.tolist() == [1.0, 1.0]
    assert {name: values.tolist() for name, values in plan.columns.items()} == {
        "level": [7.0, 9.0], "score_chosen": [5.0, 4.0], "score_rejected": [1.0, 0.0],
    }  # fmt: skip


def test_several_pairs_of_a_prompt_share_its_weight():
    selection = select(completions(2, 3), Scores(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 0.0]])), "all")
    rows, plan, _ = build_table([selection], {"weight": torch.tensor([2.0, 4.0])}, 99, 0)
    assert len(rows.prompt) == 6 and plan.share.tolist() == pytest.approx([2 / 3] * 3 + [2.0] * 2)
    kept = selection.only(selection.prompts == 1)
    rows, plan, (place,) = build_table([kept], {}, 99, 0)
    assert plan.pairs.tolist() == [[0, 2], [1, 2]] and plan.share.tolist() == [0.5, 0.5]
    assert place.tolist() == [-1, 0, -1, 1, -1, 2]


def test_groups_leave_out_what_nobody_scored():
    scores = Scores(torch.tensor([[1.0, 9.0, 3.0], [2.0, 5.0, 4.0]]), torch.tensor([[True, False, True], [True] * 3]))
    selection = select(completions(2, 3), scores, "group")
    assert selection.pairs.tolist() == [[4, 0], [3, 1]] and selection.groups.tolist() == [[0, -1, 4], [1, 3, 5]]
    rows, plan, (place,) = build_table([selection], {}, 99, 0)
    assert place.tolist() == [0, 1, -1, 2, 3, 4] and len(rows.prompt) == 5
    assert plan.groups.tolist() == [[0, -1, 3], [1, 2, 4]] and plan.scores.tolist() == [
        [1.0, 0.0, 3.0],
        [2.0, 5.0, 4.0],
    ]
    assert plan.columns["score_chosen"].tolist() == [3.0, 5.0]


def test_two_traces_side_by_side():
    """With a trace the prompts 0 and 1 have a pair, without one the prompts 1 and 2; each missing one has the other's columns."""
    traced = select(completions(3, 2), Scores(torch.tensor([[0.0, 1.0], [5.0, 2.0], [3.0, 3.0]])), "best_worst")
    empty = select(completions(3, 2, 20), Scores(torch.tensor([[1.0, 1.0], [0.0, 4.0], [8.0, 6.0]])), "best_worst")
    rows, plan, places = build_table([traced, empty], {"weight": torch.tensor([1.0, 2.0, 3.0])}, 99, 0)
    assert [scored for _, scored in shown(rows)] == [[10], [11, 11], [13, 13], [14], [21, 21], [22], [24], [25, 25]]
    assert rows.prompt.tolist() == [0, 1, 0, 1, 4, 5, 4, 5]  # a prompt without a trace is another one
    assert plan.pairs.tolist() == [[2, 0], [1, 3], [-1, -1]]
    assert plan.empty_pairs.tolist() == [[-1, -1], [6, 4], [5, 7]]
    assert plan.columns["score_chosen"].tolist() == [1.0, 5.0, 8.0]
    assert plan.empty_columns["score_chosen"].tolist() == [1.0, 4.0, 8.0]
    assert plan.empty_columns["score_rejected"].tolist() == [0.0, 0.0, 6.0]
    assert plan.share.tolist() == [1.0, 2.0, 3.0] and plan.count == 3
    assert [place.tolist() for place in places] == [[0, 1, -1, 2, 3, -1], [-1, 4, 5, -1, 6, 7]]


@pytest.mark.parametrize("traces", [1, 2])
def test_where_nothing_is_learnt_one_row_takes_part(traces):
    tied = select(completions(2, 2), Scores(torch.zeros(2, 2)), "best_worst")
    rows, plan, _ = build_table([tied] * traces, {}, 99, 0)
    assert len(rows.prompt) == 1 and len(plan.pairs) == 0 and plan.count == 2


def test_images_keep_all_rows_in_their_order():
    made = completions(3, 2)
    made.vision = {"pixel_values": torch.arange(6)}
    selection = select(made, Scores(torch.tensor([[1.0, 4.0], [3.0, 3.0], [2.0, 0.0]])), "best_worst")
    rows, plan, (place,) = build_table([selection], {}, 1, 0)  # `max_length` cuts no prompt that holds an image
    assert place.tolist() == [0, 1, 2, 3, 4, 5] and [len(prompt) for prompt, _ in shown(rows)] == [2] * 6
    assert plan.pairs.tolist() == [[3, 0], [2, 5]] and rows.inputs["pixel_values"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_judges_answers():
    probabilities = torch.tensor([[[0.5, 0.9, 0.6], [0.1, 0.5, 0.3], [0.4, 0.7, 0.5]]])
    scores = Scores(torch.tensor([[0.75, 0.2, 0.55]]), probabilities=probabilities)
    selection = select(completions(1, 3), scores, "all")
    assert selection.pairs.tolist() == [[0, 1], [0, 2], [2, 1]]
    for win_rates in (False, True):
        _, plan, _ = build_table([selection], {}, 99, 0, win_rates)
        assert plan.columns["preference_prob"].tolist() == pytest.approx([0.9, 0.6, 0.7])
        assert ("score_chosen" in plan.columns) == win_rates
    assert plan.columns["score_chosen"].tolist() == pytest.approx([0.75, 0.75, 0.55])


def test_scores_without_a_mask_are_all_there():
    assert Scores(torch.zeros(2, 3)).mask.tolist() == [[True] * 3] * 2
    picked = Selection(completions(2, 2), Scores(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), torch.tensor([[2, 0]]))
    assert picked.scores_of(torch.tensor([[2, -1], [1, 3]])).tolist() == [[2.0, 0.0], [3.0, 4.0]]
