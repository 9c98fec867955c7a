"""The plain losses of TRL on a batch, and what all losses inherit."""

import logging
import math

import pytest
import torch

from tests.losses.batches import pairs, slope, trl_formula
from trl_ext.losses import Loss, PreferenceBatch
from trl_ext.losses.base import PLAIN_LOSSES, SigmoidLoss, hinge, ipo, sigmoid, warn_once
from trl_ext.losses.online_ipo import OnlineIPOLoss


def test_sigmoid_by_hand():
    batch = pairs([-4.0, 0.0, 6.0], beta=0.5, requires_grad=True)
    expected = [math.log1p(math.exp(2)), math.log(2), math.log1p(math.exp(-3))]
    for loss in (sigmoid, SigmoidLoss()):
        assert loss(batch).tolist() == pytest.approx(expected)
        assert slope(loss, batch).tolist() == pytest.approx([-0.5 / (1 + math.exp(0.5 * d)) for d in (-4, 0, 6)])


def test_hinge_by_hand():
    batch = pairs([-4.0, 0.0, 1.0, 3.0], beta=0.5, requires_grad=True)
    assert hinge(batch).tolist() == pytest.approx([3.0, 1.0, 0.5, 0.0])
    assert slope(hinge, batch).tolist() == [-0.5, -0.5, -0.5, 0.0]


def test_ipo_by_hand():
    # Log-ratios of `pairs` are delta / 2 + 0.5 and -delta / 2 + 0.5: 2.5 and -1.5, over 5 and 2 tokens; 1 and 0 over 4 and 8
    batch = pairs([4.0, 1.0], beta=0.25, lengths=([5, 4], [2, 8]), requires_grad=True)
    distances = [2.5 / 5 + 1.5 / 2 - 2, 1 / 4 - 2]
    assert ipo(batch).tolist() == pytest.approx([distance**2 for distance in distances])
    chosen, rejected = torch.autograd.grad(ipo(batch).sum(), [batch.chosen_logps, batch.rejected_logps])
    assert chosen.tolist() == pytest.approx([2 * distances[0] / 5, 2 * distances[1] / 4])
    assert rejected.tolist() == pytest.approx([-2 * distances[0] / 2, -2 * distances[1] / 8])


def test_ipo_where_nothing_is_left_of_a_completion():
    given = torch.tensor([-3.0, 0.0], dtype=torch.float64, requires_grad=True)
    zeros, lengths = torch.zeros(2, dtype=torch.float64), torch.tensor([3, 0])
    batch = PreferenceBatch(given, zeros, zeros, zeros, lengths, lengths.flip(0), beta=0.5)
    assert ipo(batch).tolist() == pytest.approx([4.0, 1.0])  # -3 / 3 - 1, and 0 / 1 - 1
    (gradient,) = torch.autograd.grad(ipo(batch).sum(), given)
    assert gradient.tolist() == pytest.approx([-4 / 3, -2.0])


@pytest.mark.parametrize("name", PLAIN_LOSSES)
def test_plain_losses_are_those_of_trl(name):
    batch = pairs([-40.0, -1.0, 0.0, 2.0, 11.0], lengths=([3, 1, 9, 4, 5], [7, 2, 9, 0, 1]), beta=0.3)
    assert torch.equal(PLAIN_LOSSES[name](batch), trl_formula(name, batch))


def test_online_ipo_by_hand():
    assert OnlineIPOLoss()(pairs([3.0, -1.0], beta=0.25)).tolist() == pytest.approx([1.0, 9.0])  # the target is 2
    judged = pairs([3.0, 3.0, 3.0, 3.0], beta=0.25, preference_prob=[1.0, 0.75, 0.5, 0.0], requires_grad=True)
    assert OnlineIPOLoss()(judged).tolist() == pytest.approx([1.0, 4.0, 9.0, 25.0])  # targets 2, 1, 0, -2
    assert slope(OnlineIPOLoss(), judged).tolist() == pytest.approx([2.0, 4.0, 6.0, 10.0])
    assert OnlineIPOLoss().divides_by_beta
    assert OnlineIPOLoss().optional_columns == ("preference_prob",)


def test_online_ipo_columns():
    probability = torch.tensor([0.75], dtype=torch.float64, requires_grad=True)
    loss = OnlineIPOLoss()(pairs([3.0], preference_prob=probability, requires_grad=True))
    assert torch.autograd.grad(loss.sum(), probability, allow_unused=True) == (None,)
    half = pairs([3.0], dtype=torch.bfloat16, preference_prob=[0.75])
    assert OnlineIPOLoss()(half).dtype == torch.bfloat16
    # bf16 holds 0.502 as 0.5; the target is taken in the column's own precision: 0.002 / 0.001 = 2
    fine = pairs([2.0], dtype=torch.bfloat16, beta=0.001, preference_prob=[0.502])
    assert OnlineIPOLoss()(fine).item() == pytest.approx(0, abs=1e-4)
    for wrong in (1.5, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"1 of 2 rows: ipo: `preference_prob` must lie in \[0, 1\]"):
            OnlineIPOLoss()(pairs([0.0, 0.0], preference_prob=[0.5, wrong]))
    assert OnlineIPOLoss()(pairs([0.0, 0.0], preference_prob=[0.0, 1.0])).tolist() == pytest.approx([25.0, 25.0])


def test_what_a_loss_inherits():
    loss = Loss()
    assert (loss.columns, loss.optional_columns, loss.required_columns, loss.column_help) == ((), (), (), "")
    assert (loss.reads, loss.takes_groups, loss.divides_by_beta) == ({"ref_logps"}, False, False)
    assert (loss.metrics(pairs([1.0])), loss.check_columns({})) == ({}, None)
    with pytest.raises(NotImplementedError):
        loss(pairs([1.0]))


def test_a_batch_by_hand():
    batch = pairs([3.0])
    assert batch.chosen_logratios.item() == pytest.approx(2.0)
    assert batch.rejected_logratios.item() == pytest.approx(-1.0)
    assert batch.delta.item() == pytest.approx(3.0)


def test_a_warning_comes_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            warn_once("only for this test")
    assert [record.getMessage() for record in caplog.records] == ["only for this test"]


def test_no_remark_by_default():
    assert Loss().remark(("score_chosen",)) == Loss().remark(()) == ""
