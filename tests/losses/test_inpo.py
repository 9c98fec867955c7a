"""INPO: the squared loss around two references."""

import pytest
import torch

from tests.losses.batches import pairs
from trl_ext import get_loss


def batch(initial_chosen, initial_rejected, deltas=(3.0, -1.0)):
    return pairs(deltas, initial_chosen_logps=initial_chosen, initial_rejected_logps=initial_rejected)


def test_by_hand():
    # policy gap = delta + reference gap; the reference gap is 0 in these batches
    loss = get_loss("inpo", eta=0.5, tau=0.2)(batch([-10.0, -8.0], [-12.0, -9.0]))
    expected = [(3.0 - 0.4 * 2.0 - 1.0) ** 2, (-1.0 - 0.4 * 1.0 - 1.0) ** 2]
    assert loss.tolist() == pytest.approx(expected)


def test_without_the_first_reference_it_is_ipo_on_sums():
    given = batch([-10.0, -8.0], [-12.0, -9.0])
    assert get_loss("inpo", eta=0.1, tau=0.0)(given).tolist() == pytest.approx([(3 - 5) ** 2, (-1 - 5) ** 2])


def test_two_equal_references_are_one():
    given = batch([-10.0, -8.0], [-10.0, -8.0])
    for tau in (0.0, 0.05, 0.1):
        torch.testing.assert_close(
            get_loss("inpo", eta=0.1, tau=tau)(given), get_loss("inpo", eta=0.1, tau=0.0)(given)
        )


@pytest.mark.parametrize(("kwargs", "message"), [({"eta": 0.0}, "must be positive"), ({"tau": 1.0}, "must lie in")])
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_loss("inpo", **kwargs)
