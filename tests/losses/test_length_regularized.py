import math

import pytest
import torch

from tests.losses.batches import pairs, slope
from trl_ext import get_loss
from trl_ext.losses.base import sigmoid


def test_values_and_gradients():
    deltas, chosen, rejected = [-3.0, 0.0, 5.0], [40, 10, 3], [10, 40, 3]
    batch = pairs(deltas, beta=0.5, lengths=(chosen, rejected), requires_grad=True)
    loss = get_loss("length_regularized", alpha=0.04)
    for value, gradient, d, w, r in zip(loss(batch), slope(loss, batch), deltas, chosen, rejected, strict=True):
        z = 0.5 * d + 0.04 * (w - r)
        assert value.item() == pytest.approx(math.log1p(math.exp(-z)), rel=1e-12)
        assert gradient.item() == pytest.approx(-0.5 / (1 + math.exp(z)), rel=1e-12)


def test_longer_winner_needs_and_gets_less_push():
    """The sign: plus. Minus, found in several codes, rewards length."""
    longer = pairs([1.0], lengths=([60], [20]), requires_grad=True)
    loss = get_loss("length_regularized")
    assert loss(longer) < sigmoid(longer)
    assert slope(loss, longer).abs() < slope(sigmoid, longer).abs()
    shorter = pairs([1.0], lengths=([20], [60]), requires_grad=True)
    assert loss(shorter) > sigmoid(shorter)
    assert slope(loss, shorter).abs() > slope(sigmoid, shorter).abs()


def test_limits_are_dpo():
    batch = pairs([-3.0, 4.0], lengths=([9, 30], [20, 5]))
    assert torch.equal(get_loss("length_regularized", alpha=0.0)(batch), sigmoid(batch))
    batch = pairs([-3.0, 4.0], lengths=([9, 30], [9, 30]))
    assert torch.equal(get_loss("length_regularized", alpha=0.5)(batch), sigmoid(batch))


def test_swapping_the_completions_negates_the_logit():
    loss = get_loss("length_regularized", alpha=0.03)
    one, other = pairs([4.0], lengths=([30], [10])), pairs([-4.0], lengths=([10], [30]))
    assert (loss(one) - loss(other)).item() == pytest.approx(-(0.1 * 4.0 + 0.03 * 20))


def test_metrics():
    metrics = get_loss("length_regularized", alpha=0.1).metrics(pairs([0.0, 0.0], lengths=([30, 10], [10, 20])))
    assert metrics["length_gap/mean"].item() == pytest.approx(5.0)
    assert metrics["length_margin/mean"].item() == pytest.approx(0.5)
