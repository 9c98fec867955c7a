import dataclasses
import math

import pytest
import torch

from tests.losses.batches import pairs, slope
from trl_ext import get_loss
from trl_ext.losses.base import sigmoid


LOG_PROBS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def by_hand(delta, h, ratio=None, *, alpha=1.0, beta=0.1, scaling="log"):
    offset = alpha * {"log": lambda: math.log(h), "linear": lambda: h, "log_ratio": lambda: math.log(ratio)}[scaling]()
    z = beta * delta - offset
    return math.log1p(math.exp(-z)), -beta / (1 + math.exp(z))


@pytest.mark.parametrize("scaling", ["log", "log_ratio", "linear"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_values_and_gradients(scaling, alpha):
    deltas, chosen, rejected = [-3.0, 0.0, 2.5, 8.0], [2.0, 1.25, 3.0, 9.0], [1.5, 1.0, 0.5, 0.25]
    batch = pairs(deltas, beta=0.5, score_chosen=chosen, score_rejected=rejected, requires_grad=True)
    loss = get_loss("offset", alpha=alpha, scaling=scaling)
    expected = [
        by_hand(d, w - r, w / r, alpha=alpha, beta=0.5, scaling=scaling)
        for d, w, r in zip(deltas, chosen, rejected, strict=True)
    ]
    assert loss(batch).tolist() == pytest.approx([value for value, _ in expected], rel=1e-12)
    assert slope(loss, batch).tolist() == pytest.approx([gradient for _, gradient in expected], rel=1e-12)


def test_worked_numbers():
    # beta * delta = 0; h = 1/2: z = ln 2, sigmoid(ln 2) = 2/3, loss = ln 1.5
    loss = get_loss("offset")(pairs([0.0], score_chosen=[1.5], score_rejected=[1.0]))
    assert loss.item() == pytest.approx(math.log(1.5))
    # alpha stands outside beta: h = e gives an offset of alpha, whatever beta is
    for beta in (0.01, 1.0):
        loss = get_loss("offset", alpha=2.0)(pairs([0.0], beta=beta, score_chosen=[math.e], score_rejected=[0.0]))
        assert loss.item() == pytest.approx(math.log1p(math.exp(2)))


@pytest.mark.parametrize(
    ("hyperparameters", "chosen", "rejected"),
    [
        ({"alpha": 0.0}, [3.0, -1.0], [1.0, 5.0]),
        ({"scaling": "linear"}, [2.0, 3.0], [2.0, 3.0]),
        ({"scaling": "log"}, [2.0, 3.0], [1.0, 2.0]),
        ({"scaling": "log_ratio"}, [2.0, 3.0], [2.0, 3.0]),
    ],
)
def test_limits_are_dpo(hyperparameters, chosen, rejected):
    batch = pairs([-4.0, 3.0], score_chosen=chosen, score_rejected=rejected)
    assert torch.equal(get_loss("offset", **hyperparameters)(batch), sigmoid(batch))


def test_loss_grows_with_the_margin():
    batch = pairs([1.0] * 4, score_chosen=[0.5, 1.0, 2.0, 4.0], score_rejected=[0.0] * 4)
    assert get_loss("offset")(batch).diff().min() > 0


@pytest.mark.parametrize("scaling", ["log", "log_ratio"])
@pytest.mark.parametrize(("chosen", "rejected"), [(1.0, 1.5), (-2.0, -1.0)])
def test_margin_that_is_not_positive_is_refused(scaling, chosen, rejected):
    if scaling == "log_ratio" and chosen > 0:
        return  # the ratio is defined; the data set is refused all the same, see check_columns
    batch = pairs([0.0], score_chosen=[chosen], score_rejected=[rejected])
    with pytest.raises(ValueError, match=r"1 of 1 pairs.*margin_floor"):
        get_loss("offset", scaling=scaling)(batch)


def test_tie_is_refused_by_log():
    with pytest.raises(ValueError, match="needs `score_chosen - score_rejected` to be positive"):
        get_loss("offset")(pairs([0.0, 0.0], score_chosen=[1.0, 2.0], score_rejected=[1.0, 1.0]))


def test_check_columns():
    columns = {
        "score_chosen": torch.tensor([2.0, 1.0, 0.5, 3.0, 3.0]),
        "score_rejected": torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0]),
    }
    assert get_loss("offset").check_columns(columns).tolist() == [False, True, True, False, False]
    assert get_loss("offset", scaling="log_ratio").check_columns(columns).tolist() == [False, True, True, True, True]
    floored = get_loss("offset", scaling="log_ratio", margin_floor=0.1).check_columns(columns)
    assert floored.tolist() == [False, False, False, True, True]
    assert not get_loss("offset", margin_floor=0.1).check_columns(columns).any()
    assert get_loss("offset", scaling="linear").check_columns(columns) is None
    assert get_loss("offset", alpha=0.0).check_columns(columns) is None


def test_margin_floor():
    floor = pairs([1.0, 1.0, 1.0], score_chosen=[1.0, 0.0, 3.0], score_rejected=[1.0, 1.0, 1.0])
    equal = pairs([1.0, 1.0, 1.0], score_chosen=[1.1, 1.1, 3.0], score_rejected=[1.0, 1.0, 1.0])
    for scaling in ("log", "log_ratio", "linear"):
        floored = get_loss("offset", scaling=scaling, margin_floor=0.1)(floor)
        torch.testing.assert_close(floored, get_loss("offset", scaling=scaling)(equal))


def test_metric():
    batch = pairs([0.0, 0.0], score_chosen=[1 + math.e, 2.0], score_rejected=[1.0, 1.0])
    assert get_loss("offset", alpha=3.0).metrics(batch)["offset/mean"].item() == pytest.approx(1.5)
    # At 0 margins are not read: a tie, whose logarithm is infinite, has no offset either
    tie = pairs([0.0], score_chosen=[1.0], score_rejected=[1.0])
    for given in (batch, tie):
        assert get_loss("offset", alpha=0.0).metrics(given)["offset/mean"].item() == 0.0
    elsewhere = dataclasses.replace(tie, **{name: getattr(tie, name).to("meta") for name in LOG_PROBS})
    assert get_loss("offset", alpha=0.0).metrics(elsewhere)["offset/mean"].device.type == "meta"


def test_help_names_what_must_be_positive():
    assert "needs `score_chosen - score_rejected` to be positive" in get_loss("offset").column_help
    ratio = get_loss("offset", scaling="log_ratio").column_help
    assert "`scaling='log_ratio'` needs `score_chosen - score_rejected` and both scores to be positive" in ratio
    with pytest.raises(ValueError, match="2 of 3 pairs"):
        get_loss("offset")(pairs([0.0] * 3, score_chosen=[1.0, 1.0, 2.0], score_rejected=[1.0] * 3))
