"""By hand: with beta 0.5, gaps of 2 and 6 nats are rewards of 1 and 3, and the cap is 2."""

import math

import pytest
import torch

from trl_ext import PreferenceBatch, get_loss


def batch(*gaps: float) -> PreferenceBatch:
    logps = torch.tensor(gaps, dtype=torch.float64, requires_grad=True)
    zeros, lengths = torch.zeros_like(logps), torch.ones(len(gaps))
    return PreferenceBatch(logps, zeros, zeros, zeros, lengths, lengths, beta=0.5)


def test_values_and_gradients():
    pairs, loss = batch(2.0, 6.0), get_loss("capped")
    values = loss(pairs)
    values.sum().backward()
    assert values.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(-2))])
    assert pairs.chosen_logps.grad.tolist() == pytest.approx([-0.5 / (1 + math.exp(1)), 0.0])
    assert loss.metrics(pairs)["capped/share"].tolist() == [0.0, 1.0]


def test_cap_is_positive():
    with pytest.raises(ValueError, match=r"`cap=0\.0` must be positive"):
        get_loss("capped", cap=0.0)
