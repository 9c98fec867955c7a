"""SimPO with a margin of each pair's own."""

import dataclasses
import math
import statistics

import pytest
import torch

from tests.losses.batches import pairs
from trl_ext import PreferenceBatch, get_loss


def softplus(z):
    return math.log1p(math.exp(z))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def batch(beta=2.0, **state):
    """Gaps per token of -1 + 2 = 1 and -3 + 2 = -1; those of the reference -2 + 2 = 0 and -1.5 + 2 = 0.5."""
    return PreferenceBatch(
        tensor(-4.0, -6.0).requires_grad_(),
        tensor(-10.0, -2.0).requires_grad_(),
        tensor(-8.0, -3.0),
        tensor(-10.0, -2.0),
        torch.tensor([4, 2]),
        torch.tensor([5, 1]),
        beta=beta,
        state={name: torch.tensor(value) for name, value in state.items()},
    )


def test_by_hand():
    given = batch(mean=0.25, std=1.5)
    values = get_loss("alpha_dpo", alpha=0.3, gamma_beta_ratio=0.4)(given)
    # d is 1 and -1.5
    margins = [0.4 + 0.3 * (1 - 0.25) / 1.5, 0.4 + 0.3 * (-1.5 - 0.25) / 1.5]
    scaled = [2 * (1 - margins[0]), 2 * (-1 - margins[1])]
    assert values.tolist() == pytest.approx([softplus(-z) for z in scaled])
    assert values.dtype == torch.float64
    # As if the margin were a number, per token
    gradients = torch.autograd.grad(values.sum(), [given.chosen_logps, given.rejected_logps])
    slopes = [-2 / (1 + math.exp(z)) for z in scaled]
    assert gradients[0].tolist() == pytest.approx([slopes[0] / 4, slopes[1] / 2])
    assert gradients[1].tolist() == pytest.approx([-slopes[0] / 5, -slopes[1] / 1])


@pytest.mark.parametrize("state", [{}, {"mean": 0.25, "std": 1.5}])
def test_without_alpha_it_is_simpo(state):
    values = get_loss("alpha_dpo", alpha=0.0, gamma_beta_ratio=0.5)(batch(beta=2.5, **state))
    assert values.tolist() == pytest.approx([softplus(-2.5 * (1 - 0.5)), softplus(-2.5 * (-1 - 0.5))])


def test_a_batch_by_hand_needs_no_state():
    values = get_loss("alpha_dpo")(batch())
    assert values.tolist() == pytest.approx([softplus(-2 * (1 - 0.6)), softplus(-2 * (-1 - 0.6))])


def test_the_reference_enters_through_the_margin_alone():
    given = batch(mean=0.0, std=1.0)
    other = dataclasses.replace(given, ref_chosen_logps=given.ref_chosen_logps.clone().requires_grad_())
    values = get_loss("alpha_dpo")(other)
    assert torch.autograd.grad(values.sum(), other.ref_chosen_logps, allow_unused=True) == (None,)
    # d of the first pair falls by 1 / 4, its margin by 0.2 / 4
    moved = dataclasses.replace(given, ref_chosen_logps=given.ref_chosen_logps + tensor(1.0, 0.0))
    values = get_loss("alpha_dpo")(moved).tolist()
    assert values[0] == pytest.approx(softplus(-2 * (1 - (0.6 + 0.2 * 0.75))))


def test_state_by_hand():
    loss = get_loss("alpha_dpo", momentum=0.8)
    start = loss.init_state()
    assert {name: value.item() for name, value in start.items()} == {"mean": 0, "std": 0}
    first = loss.update(start, batch())
    assert first["mean"].item() == pytest.approx(0.2 * -0.25)
    assert first["std"].item() == pytest.approx(0.2 * statistics.stdev([1, -1.5]))
    # Over 7 tokens each: 1, 3 and 5
    second = loss.update(first, pairs([7.0, 21.0, 35.0]))
    assert second["mean"].item() == pytest.approx(0.8 * 0.2 * -0.25 + 0.2 * 3)
    assert second["std"].item() == pytest.approx(0.8 * 0.2 * statistics.stdev([1, -1.5]) + 0.2 * 2)
    assert not any(value.requires_grad for value in first.values())
    one = loss.update(second, pairs([70.0]))
    assert one["mean"].item() == pytest.approx(0.8 * second["mean"].item() + 0.2 * 10)
    assert one["std"] == second["std"]
    assert loss.update(second, pairs([])) == second


def test_statistics_are_over_all_processes():
    elsewhere = {"values": 8.0, "count": 2.0, "squares": (3.0 - 3.0) ** 2 + (5.0 - 3.0) ** 2}
    here = get_loss("alpha_dpo", momentum=0.0).update(
        {"mean": torch.tensor(9.0), "std": torch.tensor(9.0)},
        pairs([7.0, 21.0]),
        lambda sums: {name: sums[name] + elsewhere[name] for name in sums},
    )
    assert here["mean"].item() == pytest.approx(3.0)  # of 1, 3, and 3, 5 there
    assert here["std"].item() == pytest.approx(statistics.stdev([1, 3, 3, 5]))


def test_equal_gaps_have_the_margin_of_a_usual_pair():
    loss = get_loss("alpha_dpo")
    given = pairs([0.7] * 3, dtype=torch.float32, beta=2.0)
    given = dataclasses.replace(given, chosen_logps=torch.full((3,), 0.7), rejected_logps=torch.zeros(3),
                                ref_chosen_logps=torch.zeros(3), ref_rejected_logps=torch.zeros(3))  # fmt: skip
    moved = loss.update(loss.init_state(), given)
    assert moved["std"] == 0 and moved["mean"].item() == pytest.approx(0.01)
    values = loss(dataclasses.replace(given, state=moved))
    assert values.tolist() == pytest.approx([softplus(-2 * (0.1 - 0.6))] * 3)


def test_metrics():
    metrics = get_loss("alpha_dpo").metrics(batch(mean=0.25, std=1.5))
    assert metrics["margin/mean"].item() == pytest.approx(0.6 + 0.2 * (-0.25 - 0.25) / 1.5)
    assert (metrics["gap/running_mean"].item(), metrics["gap/running_std"].item()) == (0.25, 1.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_moved_state_at_extremes(dtype):
    loss, now = get_loss("alpha_dpo"), get_loss("alpha_dpo").init_state()
    for _ in range(3):
        given = pairs(
            [1e5, -1e5, 1e5, 0.0, 3.0], dtype=dtype, requires_grad=True, lengths=([1, 9, 1, 0, 5], [9, 1, 1, 3, 5])
        )
        now = loss.update(now, given)
        values = loss(dataclasses.replace(given, state=now))
        values.float().sum().backward()
        assert values.isfinite().all() and given.chosen_logps.grad.isfinite().all()
    assert all(value.isfinite() for value in now.values())
