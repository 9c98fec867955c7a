"""SimPO."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.cpo import CPOTrainer

from tests.losses.batches import alone
from trl_ext import get_loss


def test_by_hand():
    given = alone([-12.0, -3.0], [-8.0, -30.0], ([8, 2], [4, 10]))
    # Averages -1.5 and -2, -1.5 and -3: less 0.25 and times 2 that is 0.5 and 2.5
    loss = get_loss("simpo", gamma_beta_ratio=0.25)(given)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log1p(math.exp(-2.5))], rel=1e-12)
    gradients = torch.autograd.grad(loss.sum(), [given.chosen_logps, given.rejected_logps])
    pushes = [2 / (1 + math.exp(0.5)), 2 / (1 + math.exp(2.5))]
    assert gradients[0].tolist() == pytest.approx([-pushes[0] / 8, -pushes[1] / 2], rel=1e-12)
    assert gradients[1].tolist() == pytest.approx([pushes[0] / 4, pushes[1] / 10], rel=1e-12)


def test_is_that_of_trls_experimental_trainer():
    """Which is given averages, and `gamma` in units of the reward."""
    given = alone([-12.0, -3.0, -40.0], [-8.0, -30.0, -7.0], ([8, 2, 10], [4, 10, 7]))
    theirs = SimpleNamespace(alpha=0.0, loss_type="simpo", simpo_gamma=0.8, beta=2.0, label_smoothing=0.0)
    theirs.accelerator = SimpleNamespace(device="cpu")
    chosen, rejected = given.chosen_logps / given.chosen_lengths, given.rejected_logps / given.rejected_lengths
    expected, *_ = CPOTrainer.cpo_loss(theirs, chosen, rejected)
    torch.testing.assert_close(get_loss("simpo", gamma_beta_ratio=0.4)(given), expected)


def test_swapping_the_completions_negates_the_logit_but_for_the_margin():
    one, other = alone([-12.0], [-8.0], ([8], [4])), alone([-8.0], [-12.0], ([4], [8]))
    loss = get_loss("simpo", gamma_beta_ratio=0.0)
    assert (loss(one) - loss(other)).item() == pytest.approx(-2 * (-1.5 + 2.0))
    # L(z) - L(-z) = -z; with the margin of 0.5 both logits are lower by 1
    loss = get_loss("simpo", gamma_beta_ratio=0.5)
    expected = math.log1p(math.exp(0.0)) - math.log1p(math.exp(2.0))
    assert (loss(one) - loss(other)).item() == pytest.approx(expected)


def test_of_lengths_only_averages_count():
    short, long = alone([-3.0], [-4.0], ([2], [2])), alone([-300.0], [-400.0], ([200], [200]))
    mixed = alone([-3.0], [-400.0], ([2], [200]))
    values = [get_loss("simpo")(given).item() for given in (short, long, mixed)]
    assert values == [values[0]] * 3


def test_a_completion_of_which_nothing_is_left():
    """Its average is 0, as everywhere where lengths are clamped."""
    given = alone([0.0], [-6.0], ([0], [3]))
    assert get_loss("simpo")(given).item() == pytest.approx(math.log1p(math.exp(-2 * (2.0 - 0.5))))


def test_metrics():
    metrics = get_loss("simpo").metrics(alone([-12.0, -3.0, -9.0], [-8.0, -30.0, -4.0], ([8, 2, 3], [4, 10, 2])))
    assert metrics["per_token/margins"].tolist() == pytest.approx([1.0, 3.0, -2.0])
    assert metrics["per_token/accuracies"].tolist() == [1.0, 1.0, 0.0]
