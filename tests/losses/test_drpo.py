"""DRPO."""

import dataclasses
import math

import pytest
import torch

from tests.losses.batches import sampled
from trl_ext import get_loss


def softmax(*logits):
    values = [math.exp(logit - max(logits)) for logit in logits]
    return [value / sum(values) for value in values]


def test_by_hand():
    """Two right ones of 2 and 4 tokens, two wrong ones of 8 and 3."""
    given = sampled([[-6.0, -8.0, -4.0, -9.0]], [[1.0, 2.0, 0.0, 0.5]], [[2, 4, 8, 3]])
    loss = get_loss("drpo", tau=2.0, max_length=10, length_temperature=0.5)(given)
    # Averages -3, -2, -0.5 and -3; length rewards 0.8 and 0.6; A is 1
    w = softmax(0.8 / 0.5, 0.6 / 0.5)
    assert loss.tolist() == pytest.approx([w[0] * 3 + w[1] * 2 + 2.0], rel=1e-12)
    loss.sum().backward()
    push = softmax(-0.25, -1.5)
    assert given.logps.grad.tolist() == [pytest.approx([-w[0] / 2, -w[1] / 4, push[0] / 8, push[1] / 3], rel=1e-6)]


@pytest.mark.parametrize(
    ("old", "cost", "slope"),
    [
        # KL per token: 3 over 6 tokens
        ([-4.0, -9.0], 100 * (0.5 - 0.2) * 0.5, -100 * 0.3 / 6),
        ([-6.0, -8.8], 0.0, 0.0),  # 0.2, which is delta
        ([-7.0, -10.0], 0.0, 0.0),  # 0
        ([-60.0, -10.0], 0.0, 0.0),  # below 0: the policy has gained
    ],
)
def test_trust_region_by_hand(old, cost, slope):
    """Above `delta` it costs its excess times itself, of which the excess is a constant; else nothing."""
    given = sampled([[-6.0, -10.0]], [[1.0, 0.0]], [[2, 4]], old=[old])
    loss, free = (get_loss("drpo", kl_weight=weight, delta=0.2 + 1e-9) for weight in (100.0, 0.0))
    assert (loss(given) - free(given)).item() == pytest.approx(cost, abs=1e-6)
    gradients = [torch.autograd.grad(each(given).sum(), given.logps)[0] for each in (loss, free)]
    assert (gradients[0] - gradients[1]).tolist() == [pytest.approx([slope] * 2, abs=1e-6)]


def test_where_the_policy_has_sampled_it_costs_nothing():
    given = sampled([[-6.0, -10.0]], [[1.0, 0.0]], [[2, 4]])
    values = [get_loss("drpo", kl_weight=weight, delta=0.0)(given) for weight in (0.0, 1e6)]
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(value.sum(), given.logps)[0] for value in values))


@pytest.mark.parametrize("scores", [[1.0, 3.0, 1.5], [0.0, 0.9, -4.0]], ids=["right", "wrong"])
@pytest.mark.parametrize("old", [[-7.0, -9.0, -1.0], [0.0, 0.0, 0.0]], ids=["near", "far"])
def test_one_sided_groups_give_nothing(scores, old):
    """Beside one that has both, and which is as it is without them."""
    both = [[-6.0, -10.0, -3.0], [1.0, 0.0, 0.0], [2, 4, 3]]
    given = sampled([[-6.0, -10.0, -3.0], both[0]], [scores, both[1]], [[2, 4, 3], both[2]], old=[old, both[0]])
    loss = get_loss("drpo")(given)
    assert loss[0].item() == 0
    loss.sum().backward()
    assert given.logps.grad[0].tolist() == [0, 0, 0]
    alone = sampled(*([each] for each in both))
    get_loss("drpo")(alone).sum().backward()
    assert torch.equal(given.logps.grad[1:], alone.logps.grad)


def test_length_is_rewarded_among_the_right_ones_alone():
    """A wrong one's length moves its average, and no weight; at a high temperature all right ones count the same."""
    logps, scores = [[-6.0, -6.0, -6.0, -6.0]], [[1.0, 1.0, 0.0, 0.0]]
    # Of equal averages the shorter one has e^(50 / 10) times the weight
    given = sampled([[-10.0, -60.0, -6.0, -6.0]], scores, [[10, 60, 3, 3]])
    get_loss("drpo", max_length=100)(given).sum().backward()
    first, second = (-given.logps.grad[0, :2] * torch.tensor([10, 60])).tolist()
    assert first / second == pytest.approx(math.exp(5), rel=1e-5) and first + second == pytest.approx(1)
    for wrong in (3, 300):
        given = sampled(logps, scores, [[10, 60, wrong, wrong]])
        get_loss("drpo", length_temperature=1e9)(given).sum().backward()
        assert given.logps.grad[0].tolist() == pytest.approx([-0.05, -0.5 / 60, 0.5 / wrong, 0.5 / wrong])


def test_wrong_ones_far_apart_neither_overflow_nor_vanish():
    """e^(s / tau) of all is 0 in floating point; the likelier one takes the whole push."""
    for scale in (1.0, 1e4):
        given = sampled([[-6.0, -1e5 * scale, -2e5 * scale]], [[1.0, 0.0, 0.0]], [[2, 1, 1]], dtype=torch.float32)
        loss = get_loss("drpo")(given)
        assert loss.item() == 13.0
        loss.sum().backward()
        assert given.logps.grad[0].tolist() == [-0.5, 1.0, 0.0]


def test_beta_and_the_reference_are_not_read():
    given = sampled([[-6.0, -10.0]], [[1.0, 0.0]], [[2, 4]])
    loss = get_loss("drpo")
    other = dataclasses.replace(given, ref_logps=None, beta=7.0)
    assert torch.equal(loss(given), loss(other)) and not loss.reads_beta


def test_metrics():
    given = sampled(
        [[-6.0, -8.0, -4.0], [-6.0, -8.0, -4.0]], [[1.0, 2.0, 0.0], [0.0, 0.5, 1.0]], [[2, 4, 8]] * 2,
        old=[[-4.0, -9.0, -3.0]] * 2, mask=[[True] * 3, [True, True, False]],
    )  # fmt: skip
    metrics = get_loss("drpo", max_length=10).metrics(given)
    expected = {
        "right/share": [2 / 3, 0.0],
        "groups/mixed": [1.0, 0.0],
        "length_reward/mean": [0.7, math.nan],
        "per_token/right": [-2.5, math.nan],
        "per_token/wrong": [-0.5, -2.5],
        "behaviour/kl": [2 / 14, 1 / 6],
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name].tolist() == pytest.approx(values, nan_ok=True), name
