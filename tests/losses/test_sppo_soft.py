"""SPPO with soft win rates, and GPO."""

import pytest
import torch

from tests.losses.batches import pairs, trl_formula
from trl_ext import get_loss


def test_by_hand():
    given = pairs([2.0], beta=0.5, score_chosen=[0.9], score_rejected=[0.2], requires_grad=True)
    # Log-ratios 1.5 and -0.5 (those of `pairs` are delta / 2 + 0.5 and -delta / 2 + 0.5); targets 0.8 and -0.6
    loss = get_loss("sppo_soft")(given)
    assert loss.item() == pytest.approx(0.7**2 + 0.1**2)
    gradients = torch.autograd.grad(loss.sum(), [given.chosen_logps, given.rejected_logps])
    assert [gradient.item() for gradient in gradients] == pytest.approx([1.4, 0.2])
    # Targets 1.8 and 0.4
    loss = get_loss("gpo", target="score")(given)
    assert loss.item() == pytest.approx(0.3**2 + 0.9**2)


def test_hard_win_rates_are_trls_sppo_hard():
    given = pairs([2.0, -3.0], beta=0.4, score_chosen=[1.0, 1.0], score_rejected=[0.0, 0.0], requires_grad=True)
    ours, theirs = get_loss("sppo_soft")(given), trl_formula("sppo_hard", given)
    assert torch.equal(ours, theirs)
    # Log-ratios 1.5, -0.5 and -1, 2; targets 1.25 and -1.25
    assert ours.tolist() == pytest.approx([0.25**2 + 0.75**2, 2.25**2 + 3.25**2])
    inputs = [given.chosen_logps, given.rejected_logps]
    for one, other in zip(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True
    ):
        assert torch.equal(one, other)


def test_a_fair_judge_wants_the_reference():
    given = pairs([0.0], score_chosen=[0.5], score_rejected=[0.5], requires_grad=True)
    loss = get_loss("sppo_soft")
    (gradient,) = torch.autograd.grad(loss(given).sum(), given.chosen_logps)
    assert gradient.item() == pytest.approx(1.0)  # the log-ratio of `pairs` is 0.5 there, its target 0


def test_scores_that_are_no_win_rates_are_refused():
    chosen = [0.9, 1.5, 0.9, -0.1, 0.9, 1.0, 0.0, float("nan")]
    rejected = [0.1, 0.2, 1.1, 0.2, -0.1, 0.0, 1.0, 0.5]
    columns = {"score_chosen": torch.tensor(chosen), "score_rejected": torch.tensor(rejected)}
    expected = [False, True, True, True, True, False, False, True]
    assert get_loss("sppo_soft").check_columns(columns).tolist() == expected
    assert get_loss("sppo_soft", target="score").check_columns(columns) is None
    with pytest.raises(ValueError, match=r'5 of 8 rows: sppo_soft reads scores as win rates.*"target": "score"'):
        get_loss("sppo_soft")(pairs([0.0] * 8, score_chosen=chosen, score_rejected=rejected))
    with pytest.raises(ValueError, match=r"choose one of \['win_rate', 'score'\]"):
        get_loss("sppo_soft", target="wins")


def test_metrics():
    given = pairs([0.0, 0.0], beta=0.1, score_chosen=[0.9, 0.7], score_rejected=[0.3, 0.2])
    metrics = get_loss("sppo_soft").metrics(given)
    assert metrics["target/chosen"].item() == pytest.approx(3.0)
    assert metrics["target/rejected"].item() == pytest.approx(-2.5)


def test_targets_keep_the_precision_of_the_scores():
    # bf16 holds 0.502 as 0.5: the target is 2, not 0
    given = pairs([3.0], dtype=torch.bfloat16, beta=0.001, score_chosen=[0.502], score_rejected=[0.499])
    assert [target.item() for target in get_loss("sppo_soft").targets(given)] == pytest.approx([2.0, -1.0])
    assert get_loss("sppo_soft").divides_by_beta
