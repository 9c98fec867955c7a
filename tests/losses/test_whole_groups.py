"""What holds for every loss that learns from whole groups alone."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.batches import group, pairs, sampled
from tests.losses.test_all_losses import WHOLE_GROUPS
from trl_ext import get_loss, list_losses, register_loss
from trl_ext.losses import Loss, loss_class


LOSSES = sorted(WHOLE_GROUPS)


def full(dtype=torch.float64, groups=3):
    """Groups of four, three and two completions, each with a right and a wrong one. What is absent has scores and no log-probs."""
    logps = [[-6.0, -12.0, -4.0, -9.0], [-3.0, -8.0, -5.0, math.nan], [-20.0, -1.0, math.nan, math.nan]]
    scores = [[1.0, 0.5, 0.0, 2.0], [0.0, 1.0, 0.5, 7.0], [1.0, 0.0, -7.0, 7.0]]
    mask = [[True] * 4, [True, True, True, False], [True, True, False, False]]
    lengths = [[2, 4, 8, 3], [1, 2, 3, 0], [7, 2, 0, 5]]
    ref = [[value + (-1) ** k for k, value in enumerate(row)] for row in logps]
    old = [[value - 0.2 * (-1) ** k for k, value in enumerate(row)] for row in logps]
    values = (each[:groups] for each in (logps, scores, lengths))
    return sampled(*values, ref=ref[:groups], old=old[:groups], mask=mask[:groups], dtype=dtype)


def test_every_one_is_here():
    assert {name for name in list_losses() if not loss_class(name).takes_pairs} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype(name, dtype):
    for groups in (1, 3):
        batch = full(dtype, groups)
        # Which the trainers give in float32
        batch = dataclasses.replace(batch, behaviour_logps=batch.behaviour_logps.float())
        loss = get_loss(name)(batch)
        assert loss.shape == (groups,) and loss.dtype == dtype and loss.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_absent_is_not_read(name):
    """Neither value nor gradient depends on it; each group is as it is alone, of its own size."""
    batch = full()
    loss = get_loss(name)
    values = loss(batch)
    values.sum().backward()
    for row, size in enumerate((4, 3, 2)):
        fields = ("ref_logps", "lengths", "scores", "mask", "behaviour_logps")
        alone = dataclasses.replace(
            batch, logps=batch.logps[row : row + 1, :size].detach().requires_grad_(),
            **{field: getattr(batch, field)[row : row + 1, :size] for field in fields},
        )  # fmt: skip
        value = loss(alone)
        value.sum().backward()
        assert torch.equal(value, values[row : row + 1])
        torch.testing.assert_close(batch.logps.grad[row, :size], alone.logps.grad[0], rtol=1e-12, atol=0)
        assert not batch.logps.grad[row, size:].any()
        for key, metric in loss.metrics(batch).items():
            torch.testing.assert_close(metric[row], loss.metrics(alone)[key][0], equal_nan=True, msg=key)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_completions_does_not_matter(name):
    batch = full(groups=1)
    order = [2, 0, 3, 1]
    fields = ("logps", "ref_logps", "lengths", "scores", "mask", "behaviour_logps")
    other = dataclasses.replace(batch, **{field: getattr(batch, field)[:, order] for field in fields})
    torch.testing.assert_close(get_loss(name)(other), get_loss(name)(batch))


@pytest.mark.parametrize("name", LOSSES)
def test_a_completion_of_which_nothing_is_left(name):
    """Truncation left no token: its average is 0, and nothing is divided by 0. A group may consist of such alone."""
    batch = sampled([[0.0, -6.0], [0.0, 0.0]], [[1.0, 0.0]] * 2, [[0, 3], [0, 0]], ref=[[0.0, -5.0], [0.0, 0.0]])
    loss = get_loss(name)(batch)
    loss.sum().backward()
    assert loss.isfinite().all() and batch.logps.grad.isfinite().all()
    assert all(not value.isnan().any() for value in get_loss(name).metrics(batch).values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_group_without_completions_gives_nothing(name):
    batch = dataclasses.replace(full(), mask=torch.zeros(3, 4, dtype=torch.bool))
    loss = get_loss(name)(batch)
    loss.sum().backward()
    assert loss.tolist() == [0] * 3 and not batch.logps.grad.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_at_extremes(name, dtype):
    """Log-probs of -1e4 in one token, and a policy as far from the others."""
    for logps, other in (([-1e4, 0.0, -1e4], [0.0, -1e4, -1e4]), ([0.0, -1e4, -5e3], [-1e4, 0.0, 0.0])):
        batch = sampled([logps], [[1.0, 0.0, 0.0]], [[1, 1, 10_000]], ref=[other], old=[other], dtype=dtype)
        loss = get_loss(name)(batch)
        loss.float().sum().backward()
        assert loss.isfinite().all() and batch.logps.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_policy_alone(name):
    batch = full()
    others = [getattr(batch, field).requires_grad_() for field in ("ref_logps", "scores", "behaviour_logps")]
    loss = get_loss(name)
    reference, *rest = torch.autograd.grad(loss(batch).sum(), others, allow_unused=True)
    assert all(gradient is None for gradient in rest)
    if "ref_logps" not in loss.reads:
        assert reference is None
    assert all(not value.requires_grad for value in loss.metrics(batch).values())


def test_trpa_by_finite_differences():
    """(What is a constant of drpo finite differences would see move.)"""
    batch = full(groups=1)

    def of(logps):
        return get_loss("trpa", kl_weight=0.5)(dataclasses.replace(batch, logps=logps))

    assert torch.autograd.gradcheck(of, batch.logps.detach().clone().requires_grad_())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LOSSES),
    st.lists(
        st.tuples(
            st.floats(-1e4, 0), st.floats(-1e4, 0), st.floats(-1e4, 0), st.integers(1, 10_000), st.sampled_from([0.0, 0.5, 1.0, 2.0])
        ),
        min_size=2,
        max_size=7,
    ),
)  # fmt: skip
def test_any_values(name, rows):
    logps, ref, old, lengths, scores = ([list(column)] for column in zip(*rows, strict=True))
    batch = sampled(logps, scores, lengths, ref=ref, old=old)
    loss = get_loss(name)(batch)
    loss.sum().backward()
    assert loss.isfinite().all() and batch.logps.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_what_cannot_be_taken_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} learns from whole groups of completions; got a PreferenceBatch"):
        get_loss(name)(pairs([1.0]))
    with pytest.raises(ValueError, match=f"{name} reads the log-probs under the policy that sampled.*behaviour_logps"):
        get_loss(name)(group([[1.0, 2.0]], [[0.0, 1.0]]))
    batch = sampled([[-1.0, -2.0]] * 2, [[1.0, math.nan], [1.0, 0.0]], [[1, 1]] * 2)
    with pytest.raises(ValueError, match=f"1 of 2 rows: {name}: the scores of a group must be finite"):
        get_loss(name)(batch)
    without = dataclasses.replace(full(), ref_logps=None)
    if "ref_logps" in get_loss(name).reads:
        with pytest.raises(ValueError, match='loss whose `reads` does not hold "ref_logps" is given none'):
            get_loss(name)(without)
    else:
        assert torch.equal(get_loss(name)(without), get_loss(name)(full()))


def test_a_class_that_takes_neither_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Neither(Loss):
        takes_pairs = False

        def __call__(self, batch):
            return batch.logps.sum(1)

    with pytest.raises(ValueError, match=r"Neither states `takes_pairs = False` and does not take groups either"):
        register_loss("neither")(Neither)
    Neither.takes_groups = True
    assert not register_loss("neither")(Neither).takes_pairs
