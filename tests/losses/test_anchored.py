import math

import pytest
import torch

from tests.losses.batches import group, pairs, slope
from trl_ext import get_loss
from trl_ext.losses.base import sigmoid


def test_values_and_gradients():
    deltas, probs = [-3.0, 0.0, 2.5, 40.0], [0.2, 0.9, 1.0, 0.0]
    batch = pairs(deltas, beta=0.5, preference_prob=probs, requires_grad=True)
    loss = get_loss("anchored")
    for value, gradient, delta, q in zip(loss(batch), slope(loss, batch), deltas, probs, strict=True):
        z = 0.5 * delta
        p = 1 / (1 + math.exp(-z))
        assert value.item() == pytest.approx(math.log1p(math.exp(z)) - q * z, rel=1e-9)
        assert gradient.item() == pytest.approx(0.5 * (p - q), rel=1e-9)


def test_tau_takes_the_place_of_one_over_beta():
    by_tau = get_loss("anchored", tau=4.0)(pairs([3.0], beta=0.1, preference_prob=[0.7]))
    by_beta = get_loss("anchored")(pairs([3.0], beta=0.25, preference_prob=[0.7]))
    assert torch.equal(by_tau, by_beta)
    assert not get_loss("anchored", tau=4.0).divides_by_beta
    assert get_loss("anchored").divides_by_beta


def test_targets():
    scores = {"score_chosen": [2.0, 1.0], "score_rejected": [1.0, 4.0]}
    q = get_loss("anchored", beta_r=0.5).target(pairs([0.0, 0.0], **scores))
    assert q.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(6))])
    both = pairs([0.0, 0.0], preference_prob=[0.3, 0.6], **scores)
    assert get_loss("anchored").target(both).tolist() == pytest.approx([0.3, 0.6])  # the probability comes first
    assert get_loss("anchored").target(pairs([0.0, 0.0])).tolist() == [1.0, 1.0]
    smoothed = get_loss("anchored", label_smoothing=0.1).target(both)
    assert smoothed.tolist() == pytest.approx([0.9 * 0.3 + 0.1 * 0.7, 0.9 * 0.6 + 0.1 * 0.4])


def test_limits_and_symmetries():
    batch = pairs([-30.0, 0.0, 7.0])
    assert torch.equal(get_loss("anchored")(batch), sigmoid(batch))
    # A constant q is label smoothing (cDPO)
    smoothed = -0.9 * torch.nn.functional.logsigmoid(batch.beta * batch.delta) - 0.1 * torch.nn.functional.logsigmoid(
        -batch.beta * batch.delta
    )
    torch.testing.assert_close(get_loss("anchored", label_smoothing=0.1)(batch), smoothed)
    # Swapping the completions and q -> 1 - q changes nothing
    first = get_loss("anchored")(pairs([-3.0, 8.0], preference_prob=[0.2, 0.6]))
    second = get_loss("anchored")(pairs([3.0, -8.0], preference_prob=[0.8, 0.4]))
    torch.testing.assert_close(first, second)


def test_minimum_is_at_the_logit_of_q():
    for q in (0.5, 0.2, 0.9):
        batch = pairs([math.log(q / (1 - q)) / 0.1], preference_prob=[q], requires_grad=True)
        assert slope(get_loss("anchored"), batch).item() == pytest.approx(0, abs=1e-12)


def test_listwise_by_hand():
    # u = (0, ln 2, ln 5) at tau = 1: p = 1/8, 2/8, 5/8; scores 0, 0, ln 2: q = 1/4, 1/4, 1/2
    batch = group([[0.0, math.log(2), math.log(5)]], [[0.0, 0.0, math.log(2)]])
    loss = get_loss("anchored", tau=1.0)(batch)
    assert loss.item() == pytest.approx(math.log(8) / 4 + math.log(4) / 4 + math.log(8 / 5) / 2)
    (gradient,) = torch.autograd.grad(loss.sum(), batch.logps)
    assert gradient[0].tolist() == pytest.approx([1 / 8 - 1 / 4, 0.0, 5 / 8 - 1 / 2])
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


def test_pair_is_the_group_of_two():
    for standardize in (False, True):
        loss = get_loss("anchored", beta_r=0.7, standardize=standardize)
        pair = pairs([3.0, -5.0], score_chosen=[2.0, 0.5], score_rejected=[1.0, 3.0])
        ratios = [
            [c, r] for c, r in zip(pair.chosen_logratios.tolist(), pair.rejected_logratios.tolist(), strict=True)
        ]
        torch.testing.assert_close(loss(group(ratios, [[2.0, 1.0], [0.5, 3.0]])), loss(pair))


def test_constant_shifts_change_nothing():
    loss = get_loss("anchored")
    first = loss(group([[1.0, 3.0, -2.0]], [[0.5, 1.0, 0.0]]))
    torch.testing.assert_close(first, loss(group([[11.0, 13.0, 8.0]], [[5.5, 6.0, 5.0]])))


@pytest.mark.parametrize("standardize", [False, True])
def test_masked_entries_are_not_read(standardize):
    loss = get_loss("anchored", standardize=standardize)
    nan = float("nan")
    short = group([[1.0, 3.0]], [[0.5, 2.0]])
    padded = group([[1.0, nan, 3.0, 1e30]], [[0.5, nan, 2.0, float("inf")]], [[True, False, True, False]])
    torch.testing.assert_close(loss(padded), loss(short))
    loss(padded).sum().backward()
    loss(short).sum().backward()
    torch.testing.assert_close(padded.logps.grad[0, [0, 2]], short.logps.grad[0])
    assert padded.logps.grad[0, [1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("standardize", [False, True])
def test_group_of_one_has_nothing_to_learn(standardize):
    batch = group([[4.0, 1.0]], [[2.0, 0.0]], [[True, False]])
    loss = get_loss("anchored", standardize=standardize)(batch)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert batch.logps.grad.abs().max() < 1e-12


def test_standardized_scores():
    # 1, 2, 3: standard deviation 1 with K - 1
    q = torch.softmax(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 0)
    batch = group([[0.0, 0.0, 5.0]], [[10.0, 20.0, 30.0]])
    expected = -(q * torch.log_softmax(0.1 * torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64), 0)).sum()
    assert get_loss("anchored", standardize=True)(batch).item() == pytest.approx(expected.item(), rel=1e-7)
    equal = get_loss("anchored", standardize=True)(group([[1.0, 1.0]], [[3.0, 3.0]]))
    assert equal.item() == pytest.approx(math.log(2))


def test_label_smoothing_of_groups_is_an_error():
    with pytest.raises(ValueError, match="for pairs only"):
        get_loss("anchored", label_smoothing=0.1)(group([[0.0, 1.0]], [[0.0, 1.0]]))
