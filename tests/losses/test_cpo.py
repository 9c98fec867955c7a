"""CPO."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.cpo import CPOTrainer

from tests.losses.batches import alone, pairs
from trl_ext import get_loss
from trl_ext.losses.base import sigmoid


def test_by_hand():
    given = alone([-12.0, -3.0], [-8.0, -30.0], ([8, 2], [4, 10]), beta=0.25)
    # Logits -1 and 6.75; averages of the chosen ones -1.5 both
    loss = get_loss("cpo", nll_weight=0.5)(given)
    expected = [math.log1p(math.exp(1.0)) + 0.75, math.log1p(math.exp(-6.75)) + 0.75]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    gradients = torch.autograd.grad(loss.sum(), [given.chosen_logps, given.rejected_logps])
    pushes = [0.25 / (1 + math.exp(-1.0)), 0.25 / (1 + math.exp(6.75))]
    assert gradients[0].tolist() == pytest.approx([-pushes[0] - 0.5 / 8, -pushes[1] - 0.5 / 2], rel=1e-12)
    assert gradients[1].tolist() == pytest.approx(pushes, rel=1e-12)


def test_the_preference_is_that_of_trls_experimental_trainer():
    given = alone([-12.0, -3.0], [-8.0, -30.0], ([8, 2], [4, 10]), beta=0.3)
    theirs = SimpleNamespace(alpha=0.0, loss_type="sigmoid", beta=0.3, label_smoothing=0.0)
    theirs.accelerator = SimpleNamespace(device="cpu")
    expected, *_ = CPOTrainer.cpo_loss(theirs, given.chosen_logps, given.rejected_logps)
    assert torch.equal(get_loss("cpo", nll_weight=0.0)(given), expected)


def test_without_the_likelihood_it_is_dpo_from_a_reference_of_zero():
    given = pairs([-3.0, 0.5, 40.0], lengths=([9, 4, 6], [3, 8, 6]))
    nothing = torch.zeros_like(given.ref_chosen_logps)
    zero = dataclasses.replace(given, ref_chosen_logps=nothing, ref_rejected_logps=nothing)
    assert torch.equal(get_loss("cpo", nll_weight=0.0)(given), sigmoid(zero))


def test_beta_of_zero_teaches_the_likelihood():
    assert not get_loss("cpo").reads_beta
    assert get_loss("cpo", nll_weight=0.0).reads_beta
    given = alone([-12.0], [-8.0], ([8], [4]), beta=0.0)
    assert get_loss("cpo")(given).item() == pytest.approx(math.log(2) + 1.5)


def test_a_completion_of_which_nothing_is_left():
    assert get_loss("cpo")(alone([0.0], [-6.0], ([0], [3]), beta=0.5)).item() == pytest.approx(
        math.log1p(math.exp(-3))
    )


def test_metrics():
    metrics = get_loss("cpo", nll_weight=7.0).metrics(alone([-12.0, -9.0], [-8.0, -1.0], ([8, 3], [4, 1])))
    assert metrics["nll/mean"].tolist() == pytest.approx([1.5, 3.0])
