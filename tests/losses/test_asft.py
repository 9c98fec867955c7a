"""Aligned SFT."""

import math

import pytest
import torch

from tests.losses.batches import alone
from trl_ext import get_loss


def published(average_chosen, average_rejected, weight):
    """The form in log-odds, in plain floats, with the clamp of the code that it was read in."""

    def odds(average):
        return average - math.log1p(-min(math.exp(average), 1 - 1e-7))

    def softplus(z):
        return max(z, 0.0) + math.log1p(math.exp(-abs(z)))

    return -average_chosen + weight * (softplus(-odds(average_chosen)) + softplus(odds(average_rejected)))


def test_by_hand():
    # e^avg of 1/4 and 1/2, of 1/2 and 1/5
    given = alone([8 * math.log(0.25), 2 * math.log(0.5)], [4 * math.log(0.5), 10 * math.log(0.2)], ([8, 2], [4, 10]))
    loss = get_loss("asft", weight=0.3)(given)
    expected = [1.3 * math.log(4) + 0.3 * math.log(2), 1.3 * math.log(2) - 0.3 * math.log(0.8)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    gradients = torch.autograd.grad(loss.sum(), [given.chosen_logps, given.rejected_logps])
    # d/da of -log(1 - e^a) are the odds, e^a / (1 - e^a): 1 and 1/4
    assert gradients[0].tolist() == pytest.approx([-1.3 / 8, -1.3 / 2], rel=1e-12)
    assert gradients[1].tolist() == pytest.approx([0.3 / 4, 0.3 * 0.25 / 10], rel=1e-12)


def test_both_forms_agree():
    averages = [-30.0, -3.0, -0.5, -1e-2, -1e-5]
    for weight in (0.1, 1.0, 3.0):
        given = alone(averages, averages[::-1], ([1] * 5, [1] * 5))
        expected = [published(w, r, weight) for w, r in zip(averages, averages[::-1], strict=True)]
        assert get_loss("asft", weight=weight)(given).tolist() == pytest.approx(expected, rel=1e-9)


def test_without_weight_it_is_the_likelihood_of_the_chosen_completion():
    given = alone([-12.0, -3.0], [-8.0, -30.0], ([8, 2], [4, 10]))
    assert get_loss("asft", weight=0.0)(given).tolist() == [1.5, 1.5]


def test_a_rejected_completion_that_is_certain():
    """`1 - e^avg` is held at 1e-7; what the policy is sure of has no gradient there, and never an infinite one."""
    given = alone([-2.0] * 4, [0.0, -1e-9, -2e-7, 3.0], ([2] * 4, [1] * 4))
    loss = get_loss("asft", weight=0.5)(given)
    held = 1.5 - 0.5 * math.log(1e-7)
    assert loss.tolist() == pytest.approx([held, held, 1.5 - 0.5 * math.log(2e-7), held], rel=1e-6)
    assert loss[0].item() == pytest.approx(published(-1.0, 0.0, 0.5), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), given.rejected_logps)
    assert gradient.tolist() == pytest.approx([0.0, 0.0, 0.5 * 5e6, 0.0], rel=1e-5)


def test_an_average_near_zero_keeps_its_digits():
    """In float32 `1 - e^a` of -3e-6 would be wrong in the second digit."""
    given = alone([0.0], [-3e-6], ([1], [1]), dtype=torch.float32)
    loss = get_loss("asft", weight=1.0)(given)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.log(-math.expm1(given.rejected_logps.item())), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e5])
def test_sums_of_any_size(size, dtype):
    given = alone([0.0, -size], [-size, 0.0], ([1] * 2, [1] * 2), dtype=dtype)
    loss, sides = get_loss("asft")(given), [given.chosen_logps, given.rejected_logps]
    gradients = torch.autograd.grad(loss.float().sum(), sides)
    assert loss.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert loss[1].item() == pytest.approx(1.1 * size + 0.1 * -math.log(1e-7), rel=1e-2)


def test_beta_is_not_read():
    assert not get_loss("asft").reads_beta
    values = [get_loss("asft")(alone([-12.0], [-8.0], ([8], [4]), beta=beta)).item() for beta in (0.0, 0.1, 5.0)]
    assert values == [values[0]] * 3


def test_metrics():
    given = alone([8 * math.log(0.25), 2 * math.log(0.5)], [4 * math.log(0.5), 10 * math.log(0.2)], ([8, 2], [4, 10]))
    metrics = get_loss("aligned_sft").metrics(given)
    assert metrics["nll/mean"].tolist() == pytest.approx([math.log(4), math.log(2)])
    assert metrics["log_odds/chosen"].tolist() == pytest.approx([math.log(1 / 3), 0.0])
    assert metrics["log_odds/rejected"].tolist() == pytest.approx([0.0, math.log(1 / 4)])
