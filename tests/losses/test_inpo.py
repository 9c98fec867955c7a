"""INPO: the squared loss around two references."""

import pytest
import torch

from tests.losses.batches import pairs
from trl_ext import PreferenceBatch, get_loss


def batch(initial_chosen, initial_rejected, deltas=(3.0, -1.0)):
    return pairs(deltas, initial_chosen_logps=initial_chosen, initial_rejected_logps=initial_rejected)


def test_by_hand():
    # policy gap = delta + reference gap; the reference gap is 0 in these batches
    loss = get_loss("inpo", eta=0.5, tau=0.2)(batch([-10.0, -8.0], [-12.0, -9.0]))
    expected = [(3.0 - 0.4 * 2.0 - 1.0) ** 2, (-1.0 - 0.4 * 1.0 - 1.0) ** 2]
    assert loss.tolist() == pytest.approx(expected)


def test_by_hand_with_a_reference_that_prefers_one():
    # pi: -9 and -14; pi_t: -10 and -13; pi_0: -12 and -16. h = 5 - tau / eta * 4 - (1 - tau / eta) * 3
    logps = [torch.tensor([value], dtype=torch.float64) for value in (-9.0, -14.0, -10.0, -13.0)]
    logps[0].requires_grad_()
    columns = {"initial_chosen_logps": torch.tensor([-12.0]), "initial_rejected_logps": torch.tensor([-16.0])}
    given = PreferenceBatch(*logps, torch.tensor([5]), torch.tensor([9]), beta=3.0, columns=columns)
    h = 5 - 0.25 * 4 - 0.75 * 3
    loss = get_loss("inpo", eta=0.4, tau=0.1)
    assert loss(given).item() == pytest.approx((h - 1.25) ** 2)
    (gradient,) = torch.autograd.grad(loss(given).sum(), logps[0])
    assert gradient.item() == pytest.approx(2 * (h - 1.25))
    assert loss.margin(given).item() == pytest.approx(h)
    assert loss.metrics(given)["margin/mean"].item() == pytest.approx(h)
    assert not loss.divides_by_beta


def test_without_the_first_reference_it_is_ipo_on_sums():
    given = batch([-10.0, -8.0], [-12.0, -9.0])
    assert get_loss("inpo", eta=0.1, tau=0.0)(given).tolist() == pytest.approx([(3 - 5) ** 2, (-1 - 5) ** 2])


def test_two_equal_references_are_one():
    given = batch([-10.0, -8.0], [-10.0, -8.0])
    for tau in (0.0, 0.05, 0.1):
        torch.testing.assert_close(
            get_loss("inpo", eta=0.1, tau=tau)(given), get_loss("inpo", eta=0.1, tau=0.0)(given)
        )
