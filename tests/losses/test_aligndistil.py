"""
AlignDistil by hand. Over three words the DPO model has (1/2, 1/4, 1/4), the reverse one (1/4, 1/2, 1/4): the sum of the differences
is 1/2, so that with `beta2` 1.998 the weight is 1. The target is then proportional to p_dpo^2 / p_rev, (1, 1/8, 1/4), that is
(8, 1, 2) / 11.
"""

import math

import pytest
import torch

from trl_ext import GroupBatch, PreferenceBatch, get_loss


LOG2 = math.log(2)
DPO, REVERSE = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
UNIFORM = torch.full((1, 3), 5.0, dtype=torch.float64)  # what is added to all logits does not count


def per_token(policy=UNIFORM, teacher=DPO, reverse=REVERSE, **kwargs):
    return get_loss("aligndistil", **{"beta2": 1.998, **kwargs}).per_token(policy, teacher, reverse)


def pairs(chosen, lengths, beta=0.1):
    zeros = torch.zeros(len(lengths), dtype=torch.float64)
    lengths = torch.tensor(lengths)
    divergences = None if chosen is None else torch.tensor(chosen, dtype=torch.float64)
    return PreferenceBatch(
        zeros, zeros, None, None, lengths, lengths + 1, beta=beta, chosen_divergences=divergences
    )  # fmt: skip


def groups(divergences, lengths, mask, beta=0.1):
    values, mask = torch.tensor(divergences, dtype=torch.float64), torch.tensor(mask)
    return GroupBatch(
        torch.zeros_like(values), None, torch.tensor(lengths), torch.zeros_like(values), mask, beta, divergences=values
    )


def test_a_token_by_hand():
    # KL(uniform || target) = log(1/3) - (log 8 + log 1 + log 2) / 3 + log 11
    policy = UNIFORM.clone().requires_grad_()
    value = per_token(policy)
    assert value.tolist() == pytest.approx([math.log(11 / 3) - 4 / 3 * LOG2], rel=1e-12)
    value.sum().backward()
    # p (log(p / target) - KL): the logarithms are log(11/24), log(11/3), log(11/6)
    assert policy.grad[0].tolist() == pytest.approx([-5 / 9 * LOG2, 4 / 9 * LOG2, 1 / 9 * LOG2], rel=1e-12)


def test_the_weight_divides_and_pushes():
    # beta2 3.998: w = 2, the target is proportional to p_dpo^3 / p_rev^2, (2, 1/16, 1/4): (32, 1, 4) / 37
    expected = (math.log(1 / 3) - math.log(32 * 4) / 3 + math.log(37)) / 2
    assert per_token(beta2=3.998).item() == pytest.approx(expected, rel=1e-12)


def test_temperature_by_hand():
    # The square roots of (1, 1/8, 1/4), whose logarithms sum to -5/2 log 2
    expected = math.log(1 / 3) + 5 / 6 * LOG2 + math.log(1 + 8**-0.5 + 0.5)
    assert per_token(temperature=2.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, -7.0])
def test_a_policy_that_is_the_target_has_nothing_to_learn(shift):
    policy = (torch.tensor([[8.0, 1.0, 2.0]], dtype=torch.float64).log() + shift).requires_grad_()
    value = per_token(policy)
    assert value.item() == pytest.approx(0, abs=1e-12)
    value.sum().backward()
    assert policy.grad.abs().max() < 1e-12


def test_where_the_two_models_agree_the_target_is_the_dpo_model():
    # w = 0.001: KL(uniform || p_dpo) = log(1/3) + (log 2 + 2 log 4) / 3
    kl = math.log(1 / 3) + 5 / 3 * LOG2
    assert per_token(reverse=DPO + 3).item() == pytest.approx(1000 * kl, rel=1e-9)
    # With `beta2=0` so too, but for a thousandth of the difference (log 2, -log 2, 0): to first order its mean under the DPO model
    assert per_token(beta2=0.0).item() == pytest.approx(1000 * kl + LOG2 / 4, rel=1e-5)


def test_each_row_by_itself():
    torch.manual_seed(0)
    logits = [3 * torch.randn(5, 7, dtype=torch.float64) for _ in range(3)]
    together = get_loss("aligndistil").per_token(*logits)
    alone = [get_loss("aligndistil").per_token(*(each[row : row + 1] for each in logits)) for row in range(5)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert (together > 0).all()


def test_extreme_logits_are_finite():
    logits = [torch.tensor([[1e4, -1e4, 0.0]]) * sign for sign in (1, -1, 1)]
    logits[0].requires_grad_()
    value = get_loss("aligndistil").per_token(*logits)
    value.sum().backward()
    assert value.isfinite().all() and logits[0].grad.isfinite().all()


def test_a_completion_counts_by_the_mean_over_its_tokens():
    batch = pairs([6.0, 4.0, 0.0], [3, 1, 0])
    assert get_loss("aligndistil")(batch).tolist() == pytest.approx([0.2, 0.4, 0.0])
    assert get_loss("aligndistil", length_norm=False)(batch).tolist() == pytest.approx([0.6, 0.4, 0.0])
    values = get_loss("aligndistil").metrics(batch)["divergence/per_token"]
    assert values[:2].tolist() == [2.0, 4.0] and values[2].isnan()  # a row that has no completion


def test_a_group_is_the_mean_over_its_completions():
    batch = groups(
        [[6.0, 4.0, float("nan")], [5.0, 1.0, 3.0]], [[3, 1, 7], [1, 1, 3]], [[True, True, False], [True] * 3]
    )
    assert get_loss("aligndistil")(batch).tolist() == pytest.approx([0.3, 0.1 * 7 / 3])
    assert get_loss("aligndistil", length_norm=False)(batch).tolist() == pytest.approx([0.5, 0.3])
    # Per token of the group, whatever the completion
    values = get_loss("aligndistil").metrics(batch)["divergence/per_token"]
    assert values.tolist() == pytest.approx([10 / 4, 9 / 5])


def test_a_batch_without_divergences_is_refused():
    with pytest.raises(ValueError, match=r"no divergences from the teachers.*`chosen_divergences`"):
        get_loss("aligndistil")(pairs(None, [1]))
