"""DPO with a dynamic beta, on filtered pairs."""

import dataclasses
import itertools
import math
import statistics

import pytest
import torch

from tests.losses.batches import pairs, trl_formula
from trl_ext import get_loss


def softplus(z):
    return math.log1p(math.exp(z))


def state(mean, std, batches=0):
    return {"mean": torch.tensor(mean), "std": torch.tensor(std), "batches": torch.tensor(batches)}


def given(deltas, mean, std, batches=0, **options):
    return dataclasses.replace(pairs(deltas, **options), state=state(mean, std, batches))


def test_beta_by_hand():
    batch = given([4.0, -2.0, 1.0], 0.5, 2.0, beta=0.5, requires_grad=True)
    loss = get_loss("beta_dpo", a=0.4, rho=0.0)
    beta = 0.5 * (1 + 0.4 * (1.0 - 0.5))  # 0.6
    values = loss(batch)
    assert values.tolist() == pytest.approx([softplus(-beta * delta) for delta in (4, -2, 1)])
    # As if beta were a number
    gradients = torch.autograd.grad(values.sum(), [batch.chosen_logps, batch.rejected_logps])
    expected = [-beta / (1 + math.exp(beta * delta)) for delta in (4, -2, 1)]
    assert gradients[0].tolist() == pytest.approx(expected)
    assert gradients[1].tolist() == pytest.approx([-value for value in expected])


@pytest.mark.parametrize("start", [(0.0, 0.0), (3.0, 0.5)])
def test_without_either_it_is_sigmoid(start):
    batch = given([4.0, -2.0, 1e-3], *start, beta=0.3)
    assert torch.equal(get_loss("beta_dpo", a=0.0, rho=0.0)(batch), trl_formula("sigmoid", batch))


def test_pairs_that_are_filtered_out_give_nothing():
    deltas = [3.0, -1.0, 0.5, 7.0, 2.0]
    for batches in range(20):
        batch = given(deltas, 1.0, 2.0, batches, beta=0.2, requires_grad=True)
        values = get_loss("beta_dpo", rho=0.4)(batch)
        kept = [index for index, value in enumerate(values.tolist()) if value != 0]
        assert len(kept) == 3
        beta = 0.2 * (1 + 0.6 * (sum(deltas[index] for index in kept) / 3 - 1.0))
        for index in kept:
            assert values[index].item() == pytest.approx(5 / 3 * softplus(-beta * deltas[index]))
        (gradient,) = torch.autograd.grad(values.sum(), batch.chosen_logps)
        assert [index for index, value in enumerate(gradient.tolist()) if value != 0] == kept
        metrics = get_loss("beta_dpo", rho=0.4).metrics(batch)
        assert metrics["beta/adapted"].item() == pytest.approx(beta)
        assert metrics["kept/share"].item() == pytest.approx(0.6)
        assert (metrics["delta/running_mean"].item(), metrics["delta/running_std"].item()) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("size", "rho", "count"),
    [(4, 0.2, 3), (5, 0.2, 4), (8, 0.2, 6), (10, 0.9, 1), (20, 0.9, 2), (3, 0.9, 1), (1, 0.2, 1), (7, 0.0, 7)],
)
def test_how_many_are_kept(size, rho, count):
    # 20 * (1 - 0.9) is a little less than 2
    values = get_loss("beta_dpo", rho=rho)(given([1.0] * size, 0.0, 1.0))
    assert (values != 0).sum() == count
    assert values.mean().item() == pytest.approx(values.max().item() * count / size)


def test_the_draw_is_without_replacement_and_with_the_chances_of_the_paper():
    deltas, mean, std = [1.0, 3.0, -2.0], 1.0, 2.0
    chances = [math.exp(-(((delta - mean) / std) ** 2) / 2) for delta in deltas]
    left_out = [0.0, 0.0, 0.0]
    for first, second in itertools.permutations(range(3), 2):
        total = sum(chances)
        left_out[3 - first - second] += chances[first] / total * chances[second] / (total - chances[first])
    counts, draws = [0, 0, 0], 3000
    for batches in range(draws):
        kept = get_loss("beta_dpo", rho=0.3)(given(deltas, mean, std, batches)) != 0
        counts[(~kept).nonzero().item()] += 1
    # Four standard errors are 0.037 at most
    assert [count / draws for count in counts] == pytest.approx(left_out, abs=0.037)


def test_unusual_gaps_are_left_out_however_small_their_chances():
    # exp(-z^2 / 2) is 0 in any float
    batch = given([0.0, -1e5, 2e5, -3e4], 0.0, 1.0)
    assert (get_loss("beta_dpo", rho=0.5, a=0.0)(batch) != 0).tolist() == [True, False, False, True]


def test_the_draw_follows_from_the_number_of_micro_batches_alone():
    loss, deltas = get_loss("beta_dpo", rho=0.5, a=0.0), [1.0] * 16

    def kept(batches):
        return (loss(given(deltas, 1.0, 1.0, batches)) != 0).tolist()

    before = torch.get_rng_state()
    first = [kept(batches) for batches in range(10)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert [kept(batches) for batches in range(10)] == first
    assert len(set(map(tuple, first))) == 10


def test_state_by_hand():
    loss = get_loss("beta_dpo")
    start = loss.init_state()
    assert {name: value.item() for name, value in start.items()} == {"mean": 0, "std": 0, "batches": 0}
    first = loss.update(start, pairs([4.0, 0.0]))
    second = loss.update(first, pairs([1.0, 2.0, 6.0], requires_grad=True))
    assert first["mean"].item() == pytest.approx(0.2)
    assert first["std"].item() == pytest.approx(0.1 * math.sqrt(8))
    assert second["mean"].item() == pytest.approx(0.9 * 0.2 + 0.1 * 3)
    assert second["std"].item() == pytest.approx(0.9 * 0.1 * math.sqrt(8) + 0.1 * math.sqrt(7))
    assert [each["batches"].item() for each in (start, first, second)] == [0, 1, 2]
    assert not any(value.requires_grad for value in second.values())
    # One pair has no spread; none at all moves nothing
    alone = loss.update(second, pairs([10.0]))
    assert alone["mean"].item() == pytest.approx(0.9 * 0.48 + 1)
    assert alone["std"].item() == second["std"].item()
    nobody = loss.update(second, pairs([]))
    assert (nobody["mean"], nobody["std"]) == (second["mean"], second["std"])


def test_statistics_are_over_all_processes():
    """Here 1, 2 and 3; the other process has 10."""
    elsewhere = {"values": 10.0, "count": 1.0, "squares": (10.0 - 4.0) ** 2}
    here = get_loss("beta_dpo").update(
        state(0.5, 1.0), pairs([1.0, 2.0, 3.0]), lambda sums: {name: sums[name] + elsewhere[name] for name in sums}
    )
    assert here["mean"].item() == pytest.approx(0.9 * 0.5 + 0.1 * 4)
    assert here["std"].item() == pytest.approx(0.9 + 0.1 * statistics.stdev([1, 2, 3, 10]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", [0.1, 1e5, -1e5])
def test_equal_deltas_have_no_spread(dtype, delta):
    loss, batch = get_loss("beta_dpo", momentum=0.0), pairs([delta] * 7, dtype=dtype)
    batch = dataclasses.replace(batch, ref_chosen_logps=batch.ref_chosen_logps * 0, ref_rejected_logps=batch.ref_rejected_logps * 0,
                                chosen_logps=torch.full((7,), delta, dtype=dtype), rejected_logps=torch.zeros(7, dtype=dtype))  # fmt: skip
    moved = loss.update(loss.init_state(), batch)
    assert moved["std"] == 0
    values = loss(dataclasses.replace(batch, state=moved))
    assert values.isfinite().all() and (values != 0).sum() <= 5
    assert values.dtype == dtype


def test_rows_without_a_pair_do_not_count():
    batch = pairs([4.0, 0.0, 0.0], lengths=([7, 7, 0], [7, 7, 0]))
    moved = get_loss("beta_dpo", momentum=0.0).update(state(0.0, 0.0), batch)
    assert (moved["mean"].item(), moved["std"].item()) == pytest.approx((2.0, math.sqrt(8)))


def test_the_floor_of_beta():
    batch = given([-100.0, -100.0], 50.0, 1.0, beta=0.1)
    loss = get_loss("beta_dpo", rho=0.0)
    assert loss.metrics(batch)["beta/adapted"].item() == pytest.approx(1e-3)
    assert loss(batch).tolist() == pytest.approx([softplus(0.1)] * 2)
    # A beta below the floor is one itself
    assert loss.metrics(dataclasses.replace(batch, beta=1e-4))["beta/adapted"].item() == pytest.approx(1e-4)


def test_a_batch_by_hand_needs_no_state():
    batch = pairs([2.0, 2.0], beta=0.5)
    beta = 0.5 * (1 + 0.6 * 2)
    assert get_loss("beta_dpo", rho=0.0)(batch).tolist() == pytest.approx([softplus(-beta * 2)] * 2)
    assert get_loss("beta_dpo").metrics(batch)["kept/share"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_moved_state_at_extremes(dtype):
    loss, now = get_loss("beta_dpo"), get_loss("beta_dpo").init_state()
    for _ in range(3):
        batch = pairs([1e5, -1e5, 1e5, 0.0, 3.0], dtype=dtype, requires_grad=True)
        now = loss.update(now, batch)
        values = loss(dataclasses.replace(batch, state=now))
        values.float().sum().backward()
        assert values.isfinite().all() and batch.chosen_logps.grad.isfinite().all()
    assert all(value.isfinite() for value in now.values())
