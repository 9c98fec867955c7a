"""What reward functions and oracles may answer."""

import math

import pytest
import torch

from trl_ext.trainers.online.rewards import call_judge, call_reward_function, judge_scores


def call(function):
    return call_reward_function("mine", function, ["p", "q"], ["a", "b"], [[1], [2]], extra=[3, 4])


def test_values_and_none():
    assert call(lambda **kwargs: [1, 2.5]).tolist() == [1.0, 2.5]
    assert call(lambda **kwargs: torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert [math.isnan(value) for value in call(lambda **kwargs: [None, 0.0]).tolist()] == [True, False]
    assert call(lambda extra, **kwargs: extra).tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "'mine' returned 1 values for 2 completions"),
        (None, "'mine' returned None for 2 completions"),
        (3.0, "'mine' returned 3.0 for 2 completions"),
        ([1.0, math.nan], "'mine' returned nan for the completion 'b'"),
        ([math.inf, 1.0], "'mine' returned inf for the completion 'a'"),
        ([1.0, "high"], "'mine' returned 'high' for the completion 'b'"),
    ],
)
def test_refused_answers(answer, message):
    with pytest.raises(ValueError, match=message):
        call(lambda **kwargs: answer)


def test_an_error_names_the_function():
    def broken(**kwargs):
        raise KeyError("judge")

    with pytest.raises(RuntimeError, match="'mine' raised KeyError on 2 completions") as error:
        call(broken)
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("answer", [[0.5], [0.5, 1.5], [0.5, math.nan], None])
def test_refused_probabilities(answer):
    with pytest.raises(ValueError, match="`judge` returned"):
        call_judge(lambda *args: answer, ["p", "q"], ["a", "b"], ["c", "d"])


def test_an_error_of_an_oracle_says_whose_it_is():
    def broken(*args):
        raise KeyError("judge")

    with pytest.raises(RuntimeError, match="`judge` raised KeyError on 2 comparisons: 'judge'") as error:
        call_judge(broken, ["p", "q"], ["a", "b"], ["c", "d"])
    assert isinstance(error.value.__cause__, KeyError)


def test_each_two_completions_are_compared_once():
    seen = []

    def longer(prompts, first, second):
        seen.extend(zip(prompts, first, second, strict=True))
        return [0.9 if len(a) > len(b) else 0.1 for a, b in zip(first, second, strict=True)]

    scores = judge_scores(longer, ["p", "q"], ["a", "bbb", "aa", "bb", "aaa", "b"])
    assert len(seen) == 6 and len(set(seen)) == 6
    assert scores.values[0].tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert scores.values[1].tolist() == pytest.approx([0.9, 0.5, 0.1])
    assert torch.allclose(scores.probabilities + scores.probabilities.transpose(1, 2), torch.ones(2, 3, 3))
