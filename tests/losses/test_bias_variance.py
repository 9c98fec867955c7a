import dataclasses
import math

import pytest
import torch

from tests.losses.batches import pairs
from trl_ext import get_loss
from trl_ext.losses.base import PLAIN_LOSSES


def both(traced, empty, **kwargs):
    return dataclasses.replace(
        pairs(traced, requires_grad=True, **kwargs), empty_trace=pairs(empty, requires_grad=True, **kwargs)
    )


def test_value_and_gradient():
    batch = both([4.0], [-2.0], beta=0.5)
    loss = get_loss("bias_variance", alpha=0.3)(batch)
    assert loss.item() == pytest.approx(0.3 * math.log1p(math.exp(-2)) + 0.7 * math.log1p(math.exp(1)))
    traced, empty = torch.autograd.grad(loss.sum(), [batch.chosen_logps, batch.empty_trace.chosen_logps])
    assert traced.item() == pytest.approx(-0.3 * 0.5 / (1 + math.exp(2)))
    assert empty.item() == pytest.approx(-0.7 * 0.5 / (1 + math.exp(-1)))


@pytest.mark.parametrize("base", ["sigmoid", "ipo", "hinge", "length_regularized", "r_dpo", "anchored"])
def test_limits(base):
    batch = both([4.0, -1.0], [-2.0, 3.0])
    plain = PLAIN_LOSSES[base] if base in PLAIN_LOSSES else get_loss(base)
    torch.testing.assert_close(get_loss("bias_variance", alpha=1.0, base=base)(batch), plain(batch))
    torch.testing.assert_close(get_loss("bias_variance", alpha=0.0, base=base)(batch), plain(batch.empty_trace))
    # The same pair twice: alpha does not matter. In between: linear in alpha
    twice = both([4.0, -1.0], [4.0, -1.0])
    torch.testing.assert_close(get_loss("bias_variance", alpha=0.2, base=base)(twice), plain(twice))
    ends = [get_loss("bias_variance", alpha=alpha, base=base)(batch) for alpha in (0.0, 1.0)]
    torch.testing.assert_close(
        get_loss("bias_variance", alpha=0.25, base=base)(batch), 0.75 * ends[0] + 0.25 * ends[1]
    )


def test_ipo_by_hand():
    # log-ratios 1.5 and -0.5 over 7 tokens each: (2 / 7 - 5)^2 at beta 0.1
    assert get_loss("bias_variance", base="ipo", alpha=1.0)(both([2.0], [0.0])).item() == pytest.approx(
        (2 / 7 - 5) ** 2
    )


def test_base_that_reads_columns():
    loss = get_loss("bias_variance", base="offset")
    assert loss.columns == ("chosen_empty_trace", "rejected_empty_trace")
    assert loss.required_columns == (*loss.columns, "score_chosen", "score_rejected")
    scores = {"score_chosen": [2.0], "score_rejected": [1.0]}
    torch.testing.assert_close(loss(both([4.0], [4.0], **scores)), get_loss("offset")(pairs([4.0], **scores)))
    assert loss.check_columns({name: torch.tensor(value) for name, value in scores.items()}).tolist() == [False]
    assert get_loss("bias_variance").required_columns == loss.columns
    assert get_loss("bias_variance", base="ipo").divides_by_beta
    assert not get_loss("bias_variance").divides_by_beta


def test_a_row_that_lacks_a_pair_has_the_other_term_alone():
    batch = both([4.0, 4.0, 4.0], [-2.0, -2.0, -2.0])
    batch = dataclasses.replace(
        batch,
        chosen_lengths=torch.tensor([7, 0, 7]),
        rejected_lengths=torch.tensor([7, 0, 7]),
        empty_trace=dataclasses.replace(batch.empty_trace, chosen_lengths=torch.tensor([7, 7, 0])),
    )
    traced, empty = math.log1p(math.exp(-0.4)), math.log1p(math.exp(0.2))
    loss = get_loss("bias_variance", alpha=0.3)(batch)
    assert loss.tolist() == pytest.approx([0.3 * traced + 0.7 * empty, 0.7 * empty, 0.3 * traced])
    loss.sum().backward()
    assert batch.chosen_logps.grad[1] == 0
    assert batch.empty_trace.chosen_logps.grad[2] == 0
    metrics = get_loss("bias_variance").metrics(batch)
    assert metrics["empty_trace/share"].item() == pytest.approx(2 / 3)
    assert metrics["empty_trace/margins"].item() == pytest.approx(-0.2)
    assert metrics["empty_trace/accuracies"].item() == 0


def test_without_the_empty_trace_pair():
    with pytest.raises(ValueError, match="chosen_empty_trace"):
        get_loss("bias_variance", alpha=1.0)(pairs([1.0]))
