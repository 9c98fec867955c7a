"""The objective of the Eurus reward model on implicit rewards."""

import math

import pytest
import torch

from tests.losses.batches import pairs, trl_formula
from trl_ext import get_loss
from trl_ext.losses.base import sigmoid


def test_by_hand():
    given = pairs([2.0], beta=0.5, requires_grad=True)
    # Log-ratios 1.5 and -0.5 (those of `pairs` are delta / 2 + 0.5 and -delta / 2 + 0.5): rewards 0.75 and -0.25
    loss = get_loss("eurus", absolute_weight=0.4)(given)
    absolute = math.log1p(math.exp(-0.75)) + math.log1p(math.exp(-0.25))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)) + 0.4 * absolute, rel=1e-12)
    gradients = torch.autograd.grad(loss.sum(), [given.chosen_logps, given.rejected_logps])
    gap = 0.5 / (1 + math.exp(1.0))
    expected = [-gap - 0.4 * 0.5 / (1 + math.exp(0.75)), gap + 0.4 * 0.5 / (1 + math.exp(0.25))]
    assert [gradient.item() for gradient in gradients] == pytest.approx(expected, rel=1e-12)


def test_without_the_absolute_part_it_is_dpo():
    given = pairs([-3.0, 0.5, 40.0])
    assert torch.equal(get_loss("eurus", absolute_weight=0.0)(given), sigmoid(given))


def test_what_both_rewards_share_counts():
    """Both log-ratios lower by the same: DPO does not see it, the absolute part pushes the chosen one up the more."""
    high, low = pairs([1.0], requires_grad=True), pairs([1.0], requires_grad=True)
    with torch.no_grad():
        low.chosen_logps.sub_(5.0)
        low.rejected_logps.sub_(5.0)
    assert sigmoid(high).item() == pytest.approx(sigmoid(low).item())
    pushes = [torch.autograd.grad(get_loss("eurus")(given).sum(), given.chosen_logps)[0] for given in (high, low)]
    assert pushes[1] < pushes[0] < 0


def test_the_absolute_part_is_trls_bco_pair():
    given = pairs([-3.0, 0.5, 4.0], beta=0.3)
    torch.testing.assert_close(get_loss("eurus").absolute(given), trl_formula("bco_pair", given))


def test_metrics():
    metrics = get_loss("eurus", absolute_weight=3.0).metrics(pairs([2.0], beta=0.5))
    expected = math.log1p(math.exp(-0.75)) + math.log1p(math.exp(-0.25))
    assert metrics["absolute/mean"].item() == pytest.approx(expected)
