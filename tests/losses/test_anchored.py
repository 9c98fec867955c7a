import dataclasses
import math

import pytest
import torch

from tests.losses.batches import group, pairs, slope
from trl_ext import get_loss
from trl_ext.losses.anchored import standardized
from trl_ext.losses.base import sigmoid, warn_once


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


def test_z_scores_by_hand():
    # One score alone has no spread; what is masked is not read
    scores = torch.tensor([[4.0, 1.0, 9.0], [1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1.0, 4.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, False], [True, True, True], [True, True, True], [True, False, True]])
    root = math.sqrt(0.5)
    expected = [[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-root, 0.0, root]]
    assert [row.tolist() for row in standardized(scores, mask)] == [pytest.approx(row, abs=1e-7) for row in expected]
    # Spread is bounded by 1e-8 from below: deviations of 1e-8, over sqrt(2) * 1e-8 + 1e-8
    tiny = standardized(torch.tensor([[0.0, 2e-8]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))
    assert tiny[0].tolist() == pytest.approx([1 - math.sqrt(2), math.sqrt(2) - 1])


def test_label_smoothing_of_groups_is_an_error():
    with pytest.raises(ValueError, match="for pairs only"):
        get_loss("anchored", label_smoothing=0.1)(group([[0.0, 1.0]], [[0.0, 1.0]]))


def test_scores_need_both_sides():
    for name in ("score_chosen", "score_rejected"):
        with pytest.raises(ValueError, match=f"has '{name}' without the score of the other completion"):
            get_loss("anchored")(pairs([0.0], **{name: [1.0]}))


def test_standardized_pairs():
    # The z-scores of two are +-1 / sqrt(2), whatever their margin
    batch = pairs([0.0, 0.0, 0.0], score_chosen=[5.0, 1.0, 2.0], score_rejected=[1.0, 3.0, 2.0])
    q = 1 / (1 + math.exp(-math.sqrt(2) / 0.5))
    target = get_loss("anchored", standardize=True, beta_r=0.5).target(batch)
    assert target.tolist() == pytest.approx([q, 1 - q, 0.5], abs=1e-7)


def test_label_smoothing_that_flips(caplog):
    warn_once.cache_clear()
    messages = []
    for e in (0.0, 0.49, 0.5, 0.7, 0.7, 1.0):
        caplog.clear()
        loss = get_loss("anchored", label_smoothing=e)
        messages.append([record.getMessage() for record in caplog.records])
    assert [len(texts) for texts in messages] == [0, 0, 1, 1, 0, 1]
    assert "`label_smoothing=0.5` makes every target 1/2" in messages[2][0]
    assert "`label_smoothing=0.7` flips more labels than it keeps" in messages[3][0]
    # At 1 every label is flipped: the loss of the swapped pair
    torch.testing.assert_close(loss(pairs([3.0, -5.0])), get_loss("anchored")(pairs([-3.0, 5.0])))


def test_no_gradient_reaches_the_scores_of_a_group():
    batch = group([[1.0, 2.0]], [[0.0, 1.0]])
    scores = batch.scores.requires_grad_()
    loss = get_loss("anchored", standardize=True)(batch)
    assert torch.autograd.grad(loss.sum(), scores, allow_unused=True) == (None,)


@pytest.mark.parametrize("standardize", [False, True])
def test_float16_groups_with_a_mask(standardize):
    """Masked entries are -65504 there, and their log-probability is -inf beside 80: it must not reach value or gradient."""
    mask = [[True, True, False, False], [True, False, True, True]]
    ratios, scores = [[80.0, -4.0, 0.0, 2.0], [1.0, 9.0, 90.0, 86.0]], [[1.0, 2.0, 9.0, 9.0], [0.5, 9.0, 1.5, 0.0]]
    loss = get_loss("anchored", tau=1.0, standardize=standardize)
    half, exact = group(ratios, scores, mask, dtype=torch.float16), group(ratios, scores, mask)
    values = loss(half)
    assert values.dtype == torch.float16
    assert values.tolist() == pytest.approx(loss(exact).tolist(), rel=2e-3)
    values.sum().backward()
    loss(exact).sum().backward()
    for row, expected in zip(half.logps.grad.tolist(), exact.logps.grad.tolist(), strict=True):
        assert row == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_group_of_none(dtype):
    """A prompt without completions adds nothing, in value and gradient."""
    batch = group([[4.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]], [[False, False], [True, True]], dtype=dtype)
    loss = get_loss("anchored", tau=1.0)(batch)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0, math.log1p(math.e) - 0.5], rel=2e-3)
    assert batch.logps.grad[0].tolist() == [0.0, 0.0]
    assert batch.logps.grad[1].isfinite().all()


def test_masked_entries_beside_very_negative_log_ratios():
    """A masked entry must weigh nothing beside any log-ratio, and nothing of it may be added."""
    batch = group([[-3e4, -3e4 - 1, 0.0]], [[0.0, 0.0, 0.0]], [[True, True, False]])
    loss = get_loss("anchored", tau=1.0)(batch)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) + 0.5)


def test_scores_of_a_group_keep_their_precision():
    # bf16 would make 6.1 and 6.12 a difference of 0.031. The log-ratios are 0 and 1: -q_1 - log(1 / (1 + e))
    batch = dataclasses.replace(
        group([[0.0, 1.0]], [[0.0, 0.0]], dtype=torch.bfloat16, beta=1.0), scores=torch.tensor([[6.10, 6.12]])
    )
    q = 1 / (1 + math.exp(-0.02 / 0.01))
    loss = get_loss("anchored", beta_r=0.01)(batch)
    assert loss.item() == pytest.approx(math.log1p(math.e) - q, abs=4e-3)
    # float64 is not narrowed to float32, where the difference would be lost
    fine = group([[0.0, 1.0]], [[1.0, 1.0 + 1e-9]], beta=1.0)
    q = 1 / (1 + math.exp(-1))
    assert get_loss("anchored", beta_r=1e-9)(fine).item() == pytest.approx(math.log1p(math.e) - q, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_in_half_precision_are_computed_with_in_float32(dtype):
    # Squares of 400 overflow float16; standardised, two scores are +-1 / sqrt(2)
    batch = group([[0.0, 1.0]], [[-400.0, 400.0]], dtype=dtype, beta=1.0)
    q = 1 / (1 + math.exp(-math.sqrt(2)))
    loss = get_loss("anchored", standardize=True)(batch)
    assert loss.item() == pytest.approx(math.log1p(math.e) - q, abs=4e-3)
    # 1.5 / 1e-5 overflows float16 too; the softmax of it is hard: all of the weight is on the first
    batch = group([[0.0, 1.0]], [[1.5, 1.0]], dtype=dtype, beta=1.0)
    assert get_loss("anchored", beta_r=1e-5)(batch).item() == pytest.approx(math.log1p(math.e), abs=8e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_of_a_group_that_are_no_numbers(value):
    with pytest.raises(ValueError, match="1 of 2 rows: anchored: the scores of a group must be finite"):
        get_loss("anchored")(group([[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, value]]))


def test_metrics():
    metrics = get_loss("anchored").metrics(pairs([0.0, 0.0], preference_prob=[0.5, 0.9]))
    assert metrics["target/mean"].item() == pytest.approx(0.7)
    assert get_loss("anchored").metrics(group([[0.0, 1.0]], [[0.0, 1.0]])) == {}


def test_remark_on_labels_that_are_taken_as_certain():
    plain, smoothed = get_loss("anchored"), get_loss("anchored", label_smoothing=0.1)
    for columns in ((), ("prompt", "chosen", "rejected")):
        said = plain.remark(columns)
        assert "takes each label as certain, which is plain DPO. Add one of these columns" in said
        assert said.startswith("The dataset has neither `preference_prob` nor scores")
        assert said.endswith("or set `label_smoothing`.")
        assert smoothed.remark(columns) == ""
    for column in ("preference_prob", "score_chosen", "score_rejected"):
        assert plain.remark(("prompt", column)) == smoothed.remark((column,)) == ""
