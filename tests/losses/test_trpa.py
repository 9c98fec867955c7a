"""TRPA."""

import dataclasses
import math

import pytest
import torch

from tests.losses.batches import sampled
from trl_ext import get_loss


def softplus(z):
    return math.log1p(math.exp(z))


def sigma(z):
    return 1 / (1 + math.exp(-z))


def test_by_hand():
    """Levels right, fair, bad and bad: five pairs, of which three have a right one on top."""
    given = sampled(
        [[-6.0, -12.0, -4.0, -9.0]], [[1.0, 0.5, 0.0, 0.0]], [[2, 4, 8, 3]], ref=[[-8.0, -10.0, -12.0, -9.0]], beta=0.5
    )
    loss = get_loss("trpa")(given)
    # Log-ratios per token 1, -0.5, 1 and 0. Times 0.5, and 2.5 where the right one is better
    pairs = [2.5 * 0.5 * 1.5, 0.0, 2.5 * 0.5 * 1.0, 0.5 * -1.5, 0.5 * -0.5]
    assert loss.tolist() == pytest.approx([sum(softplus(-h) for h in pairs) / 5], rel=1e-12)
    loss.sum().backward()
    pushes = [sigma(-h) / 5 for h in pairs]
    first = 1.25 * (pushes[0] + pushes[1] + pushes[2])
    second = 0.5 * (pushes[3] + pushes[4]) - 1.25 * pushes[0]
    third, fourth = -1.25 * pushes[1] - 0.5 * pushes[3], -1.25 * pushes[2] - 0.5 * pushes[4]
    expected = [-first / 2, -second / 4, -third / 8, -fourth / 3]
    assert given.logps.grad.tolist() == [pytest.approx(expected, rel=1e-12)]


def test_kl_by_hand():
    """Completions of one level have no pair: what is left is the KL to the policy that sampled."""
    given = sampled([[-6.0, -12.0]], [[1.0, 1.0]], [[2, 4]], old=[[-5.0, -14.0]])
    loss = get_loss("trpa", kl_weight=3.0)(given)
    # Per token -0.5 over 2 tokens, 0.5 over 4
    values = [math.exp(0.5) - 0.5 - 1, math.exp(-0.5) + 0.5 - 1]
    assert loss.tolist() == pytest.approx([3 * (2 * values[0] + 4 * values[1]) / 6], rel=1e-12)
    loss.sum().backward()
    assert given.logps.grad.tolist() == [
        pytest.approx([3 * (1 - math.exp(0.5)) / 6, 3 * (1 - math.exp(-0.5)) / 6], rel=1e-12)
    ]


def test_kl_is_cut_at_ten_on_either_side():
    """exp(2.61) - 2.61 - 1 is 9.99, exp(2.63) - 2.63 - 1 is 10.24; exp(-11.1) + 11.1 - 1 is 10.1."""
    for old, value, moves in [(2.61, math.exp(2.61) - 3.61, True), (2.63, 10, False), (-10.9, 9.9, True), (-11.1, 10, False),
                              (1e5, 10, False), (-1e5, 10, False)]:  # fmt: skip
        given = sampled([[-7.0, -7.0]], [[1.0, 1.0]], [[1, 1]], old=[[old - 7, old - 7]])
        loss = get_loss("trpa", kl_weight=1.0)(given)
        loss.sum().backward()
        assert loss.item() == pytest.approx(value, abs=1e-4), old
        assert given.logps.grad.isfinite().all() and bool(given.logps.grad.any()) == moves, old


def test_at_the_start_it_is_log_2():
    """Policy, reference and the policy that sampled are one, whatever the levels and sizes."""
    given = sampled([[-6.0, -12.0, -4.0], [-9.0, -1.0, 0.0]], [[2.0, 1.0, 0.0], [0.0, 1.0, 9.0]], [[2, 4, 8], [3, 1, 5]],
                    mask=[[True] * 3, [True, True, False]])  # fmt: skip
    assert get_loss("trpa")(given).tolist() == pytest.approx([math.log(2)] * 2, rel=1e-12)


def test_a_mean_over_pairs_is_one_of_each_group():
    """A group of two levels and four completions has four pairs, one of two has one: each counts as one group."""
    many = sampled([[-6.0, -6.0, -4.0, -4.0]], [[1.0, 1.0, 0.0, 0.0]], [[2] * 4], ref=[[-8.0, -8.0, -2.0, -2.0]])
    one = sampled([[-6.0, -4.0]], [[1.0, 0.0]], [[2, 2]], ref=[[-8.0, -2.0]])
    values = [get_loss("trpa")(batch).item() for batch in (many, one)]
    assert values[0] == pytest.approx(values[1]) == softplus(-0.25 * 2)


def test_kappa_is_for_what_is_right():
    """From `correct` on; at 1 none is steeper, and no level is right above all of them."""
    given = sampled([[-6.0, -4.0]], [[3.0, 1.0]], [[2, 2]], ref=[[-8.0, -2.0]])
    steep, plain = softplus(-0.25 * 2), softplus(-0.1 * 2)
    for kwargs, value in [({"correct": 3.0}, steep), ({"correct": 3.1}, plain), ({"kappa": 1.0}, plain), ({}, steep),
                          ({"kappa": 5.0}, softplus(-1.0))]:  # fmt: skip
        assert get_loss("trpa", **kwargs)(given).item() == pytest.approx(value), kwargs


def test_only_the_order_of_levels_counts():
    given = sampled([[-6.0, -12.0, -4.0]], [[3.0, 2.0, 1.0]], [[2, 4, 8]], ref=[[-8.0, -10.0, -12.0]])
    spread = dataclasses.replace(given, scores=torch.tensor([[300.0, 2.5, 1.0]]))
    loss = get_loss("trpa", correct=2.6)
    assert torch.equal(loss(given), loss(spread))


def test_metrics():
    given = sampled(
        [[-6.0, -12.0, -4.0, -9.0], [-1.0, -2.0, -5.0, -5.0]], [[1.0, 0.5, 0.0, 0.0], [2.0] * 4], [[2, 4, 8, 3], [1] * 4],
        ref=[[-8.0, -10.0, -12.0, -9.0]] * 2, old=[[-7.0, -12.0, -4.0, -9.0], [-1.0, -2.0, 3.0, 3.0]],
        mask=[[True] * 4, [True, True, False, False]],
    )  # fmt: skip
    metrics = get_loss("trpa").metrics(given)
    assert metrics["right/share"].tolist() == [0.25, 1.0]
    # 1 > -0.5, 1 > 1 no, 1 > 0, -0.5 > 1 no, -0.5 > 0 no
    assert metrics["ranking/accuracies"].tolist() == pytest.approx([0.4, math.nan], nan_ok=True)
    assert metrics["ranking/pairs"].tolist() == [5, 0]
    assert metrics["behaviour/kl"].tolist() == pytest.approx([2 * (math.exp(-0.5) - 0.5) / 17, 0])
