"""Reward model distillation: d-DPO with numbers, e-DPO with lists."""

import dataclasses

import pytest
import torch

from tests.losses.batches import pairs, slope
from trl_ext import get_loss


MEAN, MIN = get_loss("reward_distillation"), get_loss("reward_distillation", combine="min")


def ensemble(deltas, chosen, rejected, **options):
    return pairs(deltas, score_chosen=chosen, score_rejected=rejected, **options)


def test_by_hand_with_one_reward_model():
    # Implicit gaps 1 and -0.5, explicit ones 2.5 and -1
    given = ensemble([4.0, -2.0], [3.0, 0.5], [0.5, 1.5], beta=0.25, requires_grad=True)
    for loss in (MEAN, MIN):
        assert loss(given).tolist() == pytest.approx([1.5**2, 0.5**2], rel=1e-12)
        # -2 beta (h - beta delta)
        assert slope(loss, given).tolist() == pytest.approx([-2 * 0.25 * 1.5, 2 * 0.25 * 0.5], rel=1e-12)


def test_by_hand_with_three_reward_models():
    # Gaps of 2, 0.5 and 3.5 with mean 2, and of -1, -3 and 1 with mean -1
    chosen, rejected = [[3.0, 0.0, 4.0], [0.0, -2.0, 1.0]], [[1.0, -0.5, 0.5], [1.0, 1.0, 0.0]]
    given = ensemble([4.0, -8.0], chosen, rejected, beta=0.25, requires_grad=True)  # implicit gaps 1 and -2
    assert MEAN(given).tolist() == pytest.approx([1.0, 1.0], rel=1e-12)
    assert slope(MEAN, given).tolist() == pytest.approx([-2 * 0.25 * 1.0, -2 * 0.25 * 1.0], rel=1e-12)
    # Squares 1, 0.25 and 6.25; and 1 twice, of which the first counts: the mean of their gradients would be 0
    assert MIN(given).tolist() == pytest.approx([0.25, 1.0], rel=1e-12)
    assert slope(MIN, given).tolist() == pytest.approx([2 * 0.25 * 0.5, -2 * 0.25 * 1.0], rel=1e-12)


def test_the_square_is_of_the_mean_and_not_the_mean_of_squares():
    """Reward models that contradict each other ask for nothing; a mean of their losses could not be 0."""
    given = ensemble([0.0], [[1.0, -1.0]], [[0.0, 0.0]])
    assert MEAN(given).tolist() == [0.0]
    assert MIN(given).tolist() == [1.0]


@pytest.mark.parametrize("loss", [MEAN, MIN], ids=["mean", "min"])
def test_swapped_pairs_have_the_same_loss(loss):
    chosen, rejected = [[0.3, 2.0], [-1.0, 0.5]], [[1.0, 0.25], [0.0, 4.0]]
    given = ensemble([3.0, -7.0], chosen, rejected)
    swapped = ensemble([-3.0, 7.0], rejected, chosen)
    torch.testing.assert_close(loss(given), loss(swapped), rtol=1e-12, atol=0)


def test_zero_where_the_gaps_are_equal():
    given = ensemble([20.0, -5.0], [2.5, 0.0], [0.5, 0.5], requires_grad=True)
    for loss in (MEAN, MIN):
        assert loss(given).tolist() == pytest.approx([0.0, 0.0], abs=1e-24)
        assert slope(loss, given).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    # Of several it is enough to agree with one
    given = ensemble([20.0], [[2.5, 9.0]], [[0.5, 0.0]])
    assert MIN(given).item() == pytest.approx(0, abs=1e-24) and MEAN(given).item() == pytest.approx(3.5**2)


@pytest.mark.parametrize("loss", [MEAN, MIN], ids=["mean", "min"])
def test_a_list_of_one_and_equal_reward_models_are_a_number(loss):
    deltas, chosen, rejected = [3.0, -7.0, 0.0], [0.25, 2.0, -1.0], [1.0, 0.5, 4.0]
    number = loss(ensemble(deltas, chosen, rejected))
    for count in (1, 4):
        alike = ensemble(deltas, *([[score] * count for score in side] for side in (chosen, rejected)))
        torch.testing.assert_close(loss(alike), number, rtol=1e-12, atol=0)


def test_the_smallest_is_at_most_that_of_each():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 6, 3, dtype=torch.float64)
    given = ensemble([-9.0, -3.0, 0.0, 3.0, 9.0, 30.0], chosen, rejected)
    each = torch.stack([MEAN(dataclasses.replace(given, columns={
        "score_chosen": chosen[:, m], "score_rejected": rejected[:, m]})) for m in range(3)], dim=1)  # fmt: skip
    assert torch.equal(MIN(given), each.amin(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [MEAN, MIN], ids=["mean", "min"])
def test_lists_at_extremes(loss, dtype):
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e-3]])
    given = ensemble([1e5, -1e5], scores, -scores, dtype=dtype, requires_grad=True)
    values = loss(given)
    assert values.dtype == dtype and values.shape == (2,) and values.isfinite().all()
    assert slope(loss, given).isfinite().all()


def test_gaps_are_not_rounded_to_the_log_probs():
    # bf16 holds 6.12 and 6.1 as the same number
    given = ensemble([0.0], torch.tensor([[6.12, 6.0]]), torch.tensor([[6.1, 6.0]]), dtype=torch.bfloat16)
    assert MEAN.gaps(given)[0].tolist() == pytest.approx([0.02, 0.0], abs=1e-6)
    assert MEAN(given).item() == pytest.approx(1e-4, rel=1e-2)


def test_an_entry_that_is_not_finite_is_refused():
    given = ensemble([0.0] * 3, [[0.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]], [[0.0, 0.0]] * 3)
    with pytest.raises(ValueError, match=r"^2 of 3 rows: reward_distillation: .*'score_chosen'.*must be finite"):
        MEAN(given)


def test_metrics():
    metrics = MEAN.metrics(ensemble([0.0, 0.0], [2.0, 1.0], [0.5, 1.5]))
    assert {name: value.item() for name, value in metrics.items()} == {"reward_gap/wanted": 0.5}
    # Gaps 2, 0 and 1, 4
    metrics = MIN.metrics(ensemble([0.0, 0.0], [[2.0, 1.0], [1.0, 3.0]], [[0.0, 1.0], [0.0, -1.0]]))
    assert {name: value.item() for name, value in metrics.items()} == {
        "reward_gap/wanted": 1.75,
        "reward_gap/disagreement": 2.5,
    }


def test_a_mixture_takes_lists_where_its_base_does():
    assert get_loss("bias_variance", base="e_dpo").takes_lists and not get_loss("bias_variance").takes_lists
    empty, traced = ([[1.0, 3.0]], [[0.0, 0.0]]), ([[4.0, 2.0]], [[0.0, 0.0]])
    given = dataclasses.replace(ensemble([10.0], *traced), empty_trace=ensemble([-10.0], *empty))
    loss = get_loss("bias_variance", base="e_dpo", base_kwargs={"combine": "min"}, alpha=0.25)
    # Gaps 1 and -1; squares 9 and 1, and 4 and 16
    assert loss(given).tolist() == pytest.approx([0.25 * 1 + 0.75 * 4])


@pytest.mark.parametrize("name", ["offset", "anchored", "margin_adaptive", "sppo_soft"])
def test_losses_that_take_one_score_refuse_lists(name):
    """Two pairs with two scores each would broadcast to four values."""
    with pytest.raises(ValueError, match=r"'score_chosen' has shape \(2, 2\): lists.*`takes_lists`"):
        get_loss(name)(ensemble([0.0, 1.0], [[0.9, 0.8]] * 2, [[0.1, 0.2]] * 2))
