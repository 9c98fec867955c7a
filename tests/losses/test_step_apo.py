"""Step-APO."""

import math

import pytest
import torch

from tests.losses.batches import pairs, slope
from trl_ext import get_loss
from trl_ext.losses.base import sigmoid


def test_by_hand():
    given = pairs([4.0, -2.0], beta=0.25, requires_grad=True, q_chosen=[0.5, 0.25], q_rejected=[-0.5, 0.75])
    # beta * delta of 1 and -0.5, less 2 and -1
    loss = get_loss("step_apo", alpha=2.0)
    assert loss(given).tolist() == pytest.approx([math.log1p(math.exp(1.0)), math.log1p(math.exp(-0.5))], rel=1e-12)
    expected = [-0.25 / (1 + math.exp(-1.0)), -0.25 / (1 + math.exp(0.5))]
    assert slope(loss, given).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_offset_with_the_linear_scaling(dtype):
    better, worse = [0.9, -0.3, 0.1, 1.0], [-1.0, 0.4, 0.1, 0.7]
    values = {"q_chosen": better, "q_rejected": worse, "score_chosen": better, "score_rejected": worse}
    given = pairs([-3.0, 0.5, 7.0, 0.0], dtype=dtype, requires_grad=True, **values)
    for alpha in (0.0, 0.3, 1.0):
        ours, theirs = get_loss("cpl", alpha=alpha), get_loss("offset", alpha=alpha, scaling="linear")
        assert torch.equal(ours(given), theirs(given))
        if dtype is not torch.bfloat16:
            assert torch.equal(slope(ours, given), slope(theirs, given))


def test_limits_are_dpo():
    given = pairs([-3.0, 4.0], q_chosen=[1.0, -0.5], q_rejected=[0.0, 0.5])
    assert torch.equal(get_loss("step_apo", alpha=0.0)(given), sigmoid(given))
    given = pairs([-3.0, 4.0], q_chosen=[0.7, -0.5], q_rejected=[0.7, -0.5])
    assert torch.equal(get_loss("step_apo", alpha=3.0)(given), sigmoid(given))


def test_values_are_not_rounded_to_the_log_probs():
    # bf16 holds 0.502 as 0.5
    given = pairs([3.0], dtype=torch.bfloat16, q_chosen=[0.502], q_rejected=[0.499])
    assert get_loss("step_apo", alpha=100.0).offset(given).item() == pytest.approx(0.3)


def test_metrics():
    metrics = get_loss("step_apo", alpha=0.5).metrics(pairs([0.0, 0.0], q_chosen=[1.0, 0.5], q_rejected=[-1.0, 0.1]))
    assert metrics["offset/mean"].item() == pytest.approx(0.5 * (2.0 + 0.4) / 2)
