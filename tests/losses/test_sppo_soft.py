"""SPPO with soft win rates, and GPO."""

import pytest
import torch

from tests.losses.batches import pairs
from trl_ext import get_loss


def test_by_hand():
    given = pairs([2.0], beta=0.5, score_chosen=[0.9], score_rejected=[0.2])
    chosen, rejected = 1.5, -0.5  # log-ratios of `pairs`: delta / 2 + 0.5 and -delta / 2 + 0.5
    expected = 0.5 * ((chosen - 0.8) ** 2 + (rejected + 0.6) ** 2)
    assert get_loss("sppo_soft")(given).item() == pytest.approx(expected)
    expected = 0.5 * ((chosen - 1.8) ** 2 + (rejected - 0.4) ** 2)
    assert get_loss("gpo", target="score")(given).item() == pytest.approx(expected)


def test_hard_win_rates_are_half_of_trls_sppo_hard():
    given = pairs([2.0, -3.0], beta=0.5, score_chosen=[1.0, 1.0], score_rejected=[0.0, 0.0])
    hard = (given.chosen_logratios - 0.5 / 0.5) ** 2 + (given.rejected_logratios + 0.5 / 0.5) ** 2
    torch.testing.assert_close(get_loss("sppo_soft")(given), hard / 2)


def test_a_fair_judge_wants_the_reference():
    given = pairs([0.0], score_chosen=[0.5], score_rejected=[0.5], requires_grad=True)
    loss = get_loss("sppo_soft")
    (gradient,) = torch.autograd.grad(loss(given).sum(), given.chosen_logps)
    assert gradient.item() == pytest.approx(0.5)  # the log-ratio of `pairs` is 0.5 there, its target 0


def test_scores_that_are_no_win_rates_are_refused():
    columns = {"score_chosen": torch.tensor([0.9, 3.0]), "score_rejected": torch.tensor([0.1, 0.2])}
    assert get_loss("sppo_soft").check_columns(columns).tolist() == [False, True]
    assert get_loss("sppo_soft", target="score").check_columns(columns) is None
    with pytest.raises(ValueError, match=r"choose one of \['win_rate', 'score'\]"):
        get_loss("sppo_soft", target="wins")
