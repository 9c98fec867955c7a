"""DMPO."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from tests.losses.batches import token_batch
from trl_ext import get_loss
from trl_ext.losses.base import sigmoid


TWO, THREE = [[0, 0, -1, 1]], [[0, -1, 1, 2]]


def test_by_hand():
    # gamma 1/2: weights of two turns 1, 1/3, of three 1, 3/7, 1/7
    # c'_w = (1 + 0.5) - 0.75 / 3 = 1.25,   c'_l = 0.7 + 1.4 * 3/7 - 0.7 / 7 = 1.2
    given = token_batch([[1.0, 0.5, 0.0, -0.75]], [[0.7, 0.0, 1.4, -0.7]], TWO, THREE, beta=2.0)
    loss = get_loss("dmpo", gamma=0.5)
    (value,) = loss(given)
    assert value.item() == pytest.approx(math.log1p(math.exp(-0.1)), rel=1e-12)
    value.backward()
    slope = -2.0 / (1 + math.exp(0.1))
    assert given.tokens.chosen_logps.grad.tolist() == [pytest.approx([slope, slope, slope, slope / 3], rel=1e-12)]
    expected = [-slope, -slope, -slope * 3 / 7, -slope / 7]
    assert given.tokens.rejected_logps.grad.tolist() == [pytest.approx(expected, rel=1e-12)]


def test_equal_steps_at_one():
    # Weights 1, 1/2 and 1, 2/3, 1/3: 1.5 - 0.375 = 1.125 and 0.7 + 1.4 * 2/3 - 0.7 / 3 = 1.4
    given = token_batch([[1.0, 0.5, 0.0, -0.75]], [[0.7, 0.0, 1.4, -0.7]], TWO, THREE, beta=0.4)
    value = get_loss("dmpo", gamma=1.0)(given).item()
    assert value == pytest.approx(math.log1p(math.exp(0.4 * 0.275)), rel=1e-12)


@pytest.mark.parametrize("gamma", [1e-300, 0.01, 0.7, 1 - 1e-3, 1 - 1e-9, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_weights_keep_their_digits(gamma, count):
    """Against exact fractions; written as it stands, the formula has no digit left of 16 where gamma is next to 1."""
    weights = get_loss("dmpo", gamma=gamma).weights(torch.arange(count)[None], torch.float64)[0].tolist()
    exact = Fraction(gamma)
    for turn, weight in enumerate(weights):
        if gamma == 1:
            expected = Fraction(count - turn, count)
        else:
            expected = exact**turn * (1 - exact ** (count - turn)) / (1 - exact**count)
        assert weight == pytest.approx(float(expected), rel=1e-11, abs=1e-320)
    assert weights[0] == 1


def test_continuous_at_one():
    given = token_batch([[1.0, 0.5, 0.0, -0.75]], [[0.7, 0.0, 1.4, -0.7]], TWO, THREE)
    for dtype in (torch.float64, torch.float32):
        turns = torch.tensor(THREE)
        near, at = (get_loss("dmpo", gamma=gamma).weights(turns, dtype) for gamma in (1 - 1e-7, 1.0))
        torch.testing.assert_close(near, at, rtol=1e-6, atol=0)
    near, at = (get_loss("dmpo", gamma=gamma)(given).item() for gamma in (1 - 1e-12, 1.0))
    assert near == pytest.approx(at, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gamma", [0.01, 0.7, 1.0])
def test_one_turn_is_dpo(gamma, dtype):
    torch.manual_seed(0)
    values = (20 * torch.randn(2, 5, 33, dtype=torch.float64)).to(dtype)
    turns = torch.where(torch.arange(33) < torch.tensor([[33], [1], [7], [20], [2]]), 0, -1)
    given = token_batch(
        *(values * (turns == 0)), turns, turns.flip(0), dtype=dtype, ref=torch.randn(5, 33, dtype=dtype)
    )
    loss = get_loss("dmpo", gamma=gamma)
    assert torch.equal(loss(given), sigmoid(given))


def test_turns_are_counted_for_each_row_and_side():
    """Two rows with other numbers of turns, padded to one width."""
    logps = [[1.0, 2.0, 4.0], [1.0, 2.0, 0.0]]
    turns = [[0, 1, 2], [0, 1, -1]]
    loss = get_loss("dmpo", gamma=0.5)
    both = loss(token_batch(logps, logps[::-1], turns, turns[::-1]))
    first = loss(token_batch(logps[:1], logps[1:], turns[:1], turns[1:]))
    # 1 + 6/7 + 4/7 = 17/7 against 1 + 2/3
    assert first.item() == pytest.approx(math.log1p(math.exp(-0.1 * (17 / 7 - 5 / 3))), rel=1e-12)
    assert both.tolist() == pytest.approx([first.item(), math.log1p(math.exp(0.1 * (17 / 7 - 5 / 3)))], rel=1e-12)
    metrics = loss.metrics(token_batch(logps, logps[::-1], turns, turns[::-1]))
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "turns/chosen": [3, 2], "turns/rejected": [2, 3]
    }  # fmt: skip


def test_a_row_without_a_scored_token():
    given = token_batch([[0.0, 0.0], [1.0, 2.0]], [[0.5, 0.0], [1.0, 1.0]], [[-1, -1], [0, 1]], [[0, -1], [0, 0]])
    loss = get_loss("dmpo")
    values = loss(given)
    assert values[0].item() == pytest.approx(math.log1p(math.exp(0.1 * 0.5)), rel=1e-12) and values.isfinite().all()
    values.sum().backward()
    assert given.tokens.chosen_logps.grad.isfinite().all() and given.tokens.rejected_logps.grad.isfinite().all()
    for name, count in (("turns/chosen", 2), ("turns/rejected", 1)):
        values = loss.metrics(given)[name]
        assert values.isnan().tolist() == [True, False] and values[1].item() == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [1e-300, 0.7, 1.0])
def test_finite_at_extremes(gamma, dtype):
    turns = torch.arange(2000)[None]
    given = token_batch(torch.full((1, 2000), -1e5), torch.zeros(1, 2000), turns, turns.clamp(max=0), dtype=dtype)
    value = get_loss("dmpo", gamma=gamma)(given)
    value.sum().backward()
    assert value.isfinite().all() and value.dtype == dtype
    assert given.tokens.chosen_logps.grad.isfinite().all()


def test_turns_are_not_rounded_to_the_log_probs():
    """bf16 holds 299 as 300: the last of 300 turns would count nothing."""
    turns = torch.arange(300)[None]
    values = torch.zeros(1, 300)
    values[0, -1] = 600.0
    given = token_batch(values, torch.zeros(1, 300), turns, turns, beta=0.5, dtype=torch.bfloat16)
    value = get_loss("dmpo", gamma=1.0)(given)
    assert value.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=0.01) and value.dtype == torch.bfloat16


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.0001, 2.0])
def test_gamma_out_of_range(gamma):
    with pytest.raises(ValueError, match=rf"dmpo: `gamma={gamma}` must lie in \(0, 1\]"):
        get_loss("dmpo", gamma=gamma)


def test_a_batch_that_lacks_what_it_reads():
    given = token_batch([[1.0]], [[1.0]], [[0]], [[0]])
    with pytest.raises(ValueError, match=r"give the `PreferenceBatch` a `TokenBatch`"):
        get_loss("dmpo")(dataclasses.replace(given, tokens=None))
    tokens = dataclasses.replace(given.tokens, ref_chosen_logps=None, ref_rejected_logps=None)
    with pytest.raises(
        ValueError, match=r"dmpo reads the reference.*`reads` does not hold \"ref_logps\" is given none"
    ):
        get_loss("dmpo")(dataclasses.replace(given, tokens=tokens))
