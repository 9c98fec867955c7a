import math

import pytest
import torch

from tests.losses.batches import pairs, slope
from trl_ext import get_loss
from trl_ext.losses.base import sigmoid


TAU = math.log(999)
# Weights at margins, for three settings (lmbda = 1); four decimals
REFERENCE = [
    (2.0, 0.5, TAU, {-5: 0.0378, -1.9: 0.1745, -1: 0.4464, -0.5: 0.7136, 0: 1, 0.5: 1.1737, 1: 1.2037, 1.9: 1.1235,
                     3: 1.0467, 5: 1.0065, 7: 0.9998, 10: 0.9952}),
    (4.0, 0.25, TAU, {-5: 0.0003, -1: 0.0696, 0.5: 1.4129, 1: 1.3423, 7: 0.9996, 10: 0.9489}),
    (2.0, 0.5, 2.0, {-1.9: 0.9453, -1: 0.7569, 0.5: 1.0976, 1: 1.0894, 3: 0.9450, 5: 0.9423, 10: 0.9934}),
]  # fmt: skip


def plain_weight(h, c_min=0.5, c_max=2.0, lmbda=1.0, tau=2.0):
    """The paper's formula as it stands."""
    if h <= -tau:
        return 1.0
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(lmbda * (abs(h) - tau)))
    return (1 / (1 + math.exp(-c * h))) / (1 / (1 + math.exp(-h)))


def weight(h, **hyperparameters):
    return get_loss("margin_adaptive", **hyperparameters).weight(torch.tensor(h, dtype=torch.float64))


@pytest.mark.parametrize(("c_max", "c_min", "tau", "values"), REFERENCE)
def test_reference_weights(c_max, c_min, tau, values):
    weights = weight([float(h) for h in values], c_max=c_max, c_min=c_min, tau=tau)
    assert weights.tolist() == pytest.approx(list(values.values()), abs=6e-5)


def test_values_and_gradients():
    deltas, margins = [-4.0, 0.0, 6.0, 1.0], [-1.5, 0.3, 2.5, -9.0]
    batch = pairs(deltas, beta=0.3, score_chosen=[h + 2 for h in margins], score_rejected=[2.0] * 4,
                  requires_grad=True)  # fmt: skip
    loss = get_loss("margin_adaptive")
    for value, gradient, delta, h in zip(loss(batch), slope(loss, batch), deltas, margins, strict=True):
        w = plain_weight(h)
        assert value.item() == pytest.approx(w * math.log1p(math.exp(-0.3 * delta)), rel=1e-12)
        assert gradient.item() == pytest.approx(-w * 0.3 / (1 + math.exp(0.3 * delta)), rel=1e-12)


def test_weight_is_one_where_the_method_says_so():
    for tau in (2.0, TAU):
        h = [0.0, tau, -tau, -tau - 1e-9, -1e4, -1e30, -float("inf")]
        assert weight(h, tau=tau).tolist() == pytest.approx([1.0] * len(h), abs=1e-12)


def test_continuous_at_minus_tau():
    assert weight([-2 + 1e-7]).item() == pytest.approx(1, abs=1e-6)


def test_target_becomes_sigmoid_of_c_h():
    h = torch.linspace(-1.99, 1.99, 41, dtype=torch.float64)
    c = 0.5 + 1.5 / (1 + 2 * torch.exp(h.abs() - 2))
    torch.testing.assert_close(weight(h.tolist()) * torch.sigmoid(h), torch.sigmoid(c * h))


def test_limit_is_dpo():
    batch = pairs([-4.0, 3.0], score_chosen=[3.0, -1.0], score_rejected=[0.0, 0.0])
    torch.testing.assert_close(get_loss("margin_adaptive", c_max=1 + 1e-9, c_min=1 - 1e-9)(batch), sigmoid(batch))


def test_no_gradient_through_the_weight():
    scores = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = get_loss("margin_adaptive")
    assert not loss.weight(scores).requires_grad
    batch = pairs([0.0, 1.0], score_chosen=scores, score_rejected=[0.0, 0.0], requires_grad=True)
    loss(batch).sum().backward()
    assert scores.grad is None


def test_metrics():
    batch = pairs([0.0, 0.0, 0.0], score_chosen=[0.0, 1.0, -1.0], score_rejected=[0.0] * 3)
    metrics = get_loss("margin_adaptive").metrics(batch)
    assert metrics["weight/min"].item() == pytest.approx(0.7569, abs=1e-4)
    assert metrics["weight/max"].item() == pytest.approx(1.0894, abs=1e-4)
    assert metrics["weight/mean"].item() == pytest.approx((1 + 0.7569 + 1.0894) / 3, abs=1e-4)
