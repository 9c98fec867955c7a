"""Expectation-maximisation around a base loss: how far labels are believed, and who gave them."""

import dataclasses
import math

import pytest
import torch

from tests.losses.batches import pairs
from trl_ext import PreferenceBatch, get_loss


BETA, RATIO = 0.4, 0.3
# One pair: log-probs, those of the reference, lengths; chosen first
LOGPS, REFS, LENGTHS = (-6.0, -9.0), (-8.0, -10.5), (4, 5)


def softplus(z):
    return math.log1p(math.exp(z))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def logit(p):
    return math.log(p / (1 - p))


# What each base loss gives for a pair whose chosen completion is the one with the index `w`
def dpo(w, other):
    return softplus(-BETA * ((LOGPS[w] - REFS[w]) - (LOGPS[other] - REFS[other])))


def ipo(w, other):
    return ((LOGPS[w] - REFS[w]) / LENGTHS[w] - (LOGPS[other] - REFS[other]) / LENGTHS[other] - 1 / (2 * BETA)) ** 2


def simpo(w, other):
    return softplus(-BETA * (LOGPS[w] / LENGTHS[w] - LOGPS[other] / LENGTHS[other] - RATIO))


def cpo(w, other):
    return softplus(-BETA * (LOGPS[w] - LOGPS[other])) - LOGPS[w] / LENGTHS[w]


BASES = {"sigmoid": dpo, "ipo": ipo, "simpo": simpo, "cpo": cpo}


def batch(state=None, **columns):
    def two(value):  # the pair and the flipped pair
        return torch.tensor([value, value], dtype=torch.float64)

    chosen, rejected = two(LOGPS[0]), two(LOGPS[1])
    chosen[1], rejected[1] = LOGPS[1], LOGPS[0]
    return PreferenceBatch(
        chosen.requires_grad_(),
        rejected.requires_grad_(),
        torch.tensor(REFS, dtype=torch.float64),
        torch.tensor(REFS[::-1], dtype=torch.float64),
        torch.tensor(LENGTHS),
        torch.tensor(LENGTHS[::-1]),
        beta=BETA,
        columns={name: torch.tensor(value) for name, value in columns.items()},
        state=state or {},
    )


def state(*reliability):
    return {"reliability": torch.tensor(reliability), "pairs": torch.tensor([0] * len(reliability))}


@pytest.mark.parametrize("base", BASES)
def test_by_hand(base):
    z = BASES[base](1, 0) - BASES[base](0, 1)
    assert abs(z) > 0.05
    given = batch(state(0.8))
    values = get_loss("robust_em", base=base, gamma_beta_ratio=RATIO)(given)
    w = [sigmoid(z + logit(0.8)), sigmoid(-z + logit(0.8))]
    expected = [
        w[0] * softplus(-z) + (1 - w[0]) * softplus(z),
        w[1] * softplus(z) + (1 - w[1]) * softplus(-z),
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)  # the state is float32
    assert values.dtype == torch.float64


def test_gradient_by_hand():
    """As if w were a number: sigma(z) - w in z, and z grows by beta with the chosen log-prob."""
    given = batch(state(0.8))
    values = get_loss("robust_em")(given)
    z = BETA * ((LOGPS[0] - REFS[0]) - (LOGPS[1] - REFS[1]))
    (gradient,) = torch.autograd.grad(values.sum(), given.chosen_logps)
    expected = [BETA * (sigmoid(each) - sigmoid(each + logit(0.8))) for each in (z, -z)]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_a_label_that_is_certain_gives_the_log_likelihood_of_the_base(base):
    z = BASES[base](1, 0) - BASES[base](0, 1)
    values = get_loss("robust_em", base=base, gamma_beta_ratio=RATIO, eta=1 - 1e-9)(batch())
    assert values.tolist() == pytest.approx([softplus(-z), softplus(z)], abs=2e-5)
    if base == "sigmoid":
        assert values.tolist() == pytest.approx([dpo(0, 1), dpo(1, 0)], abs=2e-5)


def test_an_annotator_who_guesses_leaves_it_to_the_model():
    z = BETA * ((LOGPS[0] - REFS[0]) - (LOGPS[1] - REFS[1]))
    given = batch()
    loss = get_loss("robust_em", eta=0.5)
    assert loss.metrics(given)["confidence/mean"].item() == pytest.approx((sigmoid(z) + sigmoid(-z)) / 2)
    assert loss.confidence(given, state(0.5)).tolist() == pytest.approx([sigmoid(z), sigmoid(-z)])
    # Where the label is believed as much as the model does, there is nothing to learn
    (gradient,) = torch.autograd.grad(loss(given).sum(), given.chosen_logps)
    assert gradient.tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize(("base", "reads"), [("sigmoid", True), ("ipo", True), ("simpo", False), ("cpo", False)])
def test_what_a_base_reads(base, reads):
    loss = get_loss("re_po", base=base)
    assert loss.reads == ({"ref_logps"} if reads else set())
    assert (loss.divides_by_beta, loss.reads_beta) == (base == "ipo", base != "cpo")
    if not reads:
        without = dataclasses.replace(batch(), ref_chosen_logps=None, ref_rejected_logps=None)
        assert torch.equal(loss(without), loss(batch()))


def test_state_by_hand_over_two_batches():
    """Annotator 1 labels both pairs, then 0 the first and 1 the second; nobody asks 2."""
    loss = get_loss("lcpo", annotators=3, rate=0.25)
    assert loss.update_first is False
    start = loss.init_state()
    assert start["reliability"].tolist() == pytest.approx([0.9] * 3)
    z = BETA * ((LOGPS[0] - REFS[0]) - (LOGPS[1] - REFS[1]))
    first = loss.update(start, batch(annotator_id=[1, 1]))
    w = [sigmoid(z + logit(0.9)), sigmoid(-z + logit(0.9))]
    one = 0.75 * 0.9 + 0.25 * sum(w) / 2
    assert first["reliability"].tolist() == pytest.approx([0.9, one, 0.9])
    assert first["pairs"].tolist() == [0, 2, 0]
    second = loss.update(first, batch(annotator_id=[0, 1]))
    expected = [0.75 * 0.9 + 0.25 * w[0], 0.75 * one + 0.25 * sigmoid(-z + logit(one)), 0.9]
    assert second["reliability"].tolist() == pytest.approx(expected)
    assert second["pairs"].tolist() == [1, 3, 0]
    assert not second["reliability"].requires_grad
    # The loss reads each pair's own annotator
    values = loss(batch(second, annotator_id=[2, 1]))
    believed = [sigmoid(z + logit(0.9)), sigmoid(-z + logit(expected[1]))]
    plain = [
        believed[0] * softplus(-z) + (1 - believed[0]) * softplus(z),
        believed[1] * softplus(z) + (1 - believed[1]) * softplus(-z),
    ]
    assert values.tolist() == pytest.approx(plain, rel=1e-6)
    metrics = loss.metrics(batch(second, annotator_id=[2, 1]))
    assert metrics["confidence/mean"].item() == pytest.approx(sum(believed) / 2)
    assert metrics["reliability/mean"].item() == pytest.approx(sum(expected) / 3)
    assert metrics["reliability/min"].item() == pytest.approx(min(expected))
    assert metrics["reliability/max"].item() == pytest.approx(max(expected))


def test_reliabilities_are_over_all_processes():
    """The other process has three pairs of annotator 0, whose w add up to 1.2."""
    loss = get_loss("robust_em", annotators=2, rate=0.5)
    elsewhere = {"w": torch.tensor([1.2, 0.0]), "pairs": torch.tensor([3.0, 0.0])}

    def reduce(sums):
        return {name: sums[name] + elsewhere[name] for name in sums}

    z = BETA * ((LOGPS[0] - REFS[0]) - (LOGPS[1] - REFS[1]))
    moved = loss.update(loss.init_state(), batch(annotator_id=[0, 1]), reduce)
    w = [sigmoid(z + logit(0.9)), sigmoid(-z + logit(0.9))]
    assert moved["reliability"].tolist() == pytest.approx([0.45 + 0.5 * (w[0] + 1.2) / 4, 0.45 + 0.5 * w[1]])
    assert moved["pairs"].tolist() == [4, 1]


def test_a_batch_without_pairs_moves_nothing():
    loss = get_loss("robust_em")
    for nobody in (pairs([]), pairs([3.0], lengths=([0], [0]))):
        moved = loss.update(loss.init_state(), nobody)
        assert moved["reliability"].tolist() == pytest.approx([0.9]) and moved["pairs"].tolist() == [0]


@pytest.mark.parametrize(("delta", "limit"), [(1e5, 1 - 1e-6), (-1e5, 1e-6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reliabilities_stay_between_0_and_1(delta, limit, dtype):
    loss = get_loss("robust_em", rate=1.0)
    given = pairs([delta] * 3, dtype=dtype, requires_grad=True)
    now = loss.init_state()
    for _ in range(3):
        now = loss.update(now, given)
    assert now["reliability"].item() == pytest.approx(limit, abs=1e-7)
    assert 0 < now["reliability"].item() < 1
    # To begin with too, where float32 would have 1
    assert 0 < get_loss("robust_em", eta=1 - 1e-12).init_state()["reliability"].item() < 1
    values = loss(dataclasses.replace(given, state=now))
    values.float().sum().backward()
    assert values.isfinite().all() and given.chosen_logps.grad.isfinite().all()
    # And comes back
    back = loss.update(now, pairs([-math.copysign(300, delta)] * 3))
    assert abs(back["reliability"].item() - limit) > 0.99


def test_annotators_that_are_none():
    loss = get_loss("robust_em", annotators=2)
    columns = {"annotator_id": torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, float("nan")])}
    assert loss.check_columns(columns).tolist() == [False, False, True, True, True, True]
    assert loss.check_columns({}) is None
    assert (loss.required_columns, get_loss("robust_em").required_columns) == (("annotator_id",), ())
    with pytest.raises(
        ValueError, match=r"^1 of 2 rows: robust_em .*`annotators=2`.* from 0 to 1\. .*\"annotators\": N"
    ):
        loss(pairs([0.0, 1.0], annotator_id=[0, 2]))
    with pytest.raises(ValueError, match="no column 'annotator_id'"):
        loss(pairs([0.0]))


def test_summary():
    loss = get_loss("robust_em", annotators=4)
    found = {"reliability": torch.tensor([0.75, 0.9, 0.25, 0.5]), "pairs": torch.tensor([12, 0, 7, 1])}
    lines = loss.summary(found).splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["annotator", "reliability", "pairs"],
        ["2", "0.2500", "7"],
        ["3", "0.5000", "1"],
        ["0", "0.7500", "12"],
    ]
    assert lines[5] == "1 of 4 annotators had no pair and stay at 0.9."
