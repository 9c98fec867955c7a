"""What a loss may ask for: the reference, tokens, behaviour log-probs, state; by the examples of the catalogue's README."""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.losses.batches import group, pairs
from tests.losses.test_catalogue import section
from trl_ext import GroupBatch, PreferenceBatch, TokenBatch, get_loss, list_losses, register_loss
from trl_ext.losses import Loss, loss_class


@pytest.fixture
def examples():
    """The losses of the README, registered."""
    namespace = {"__name__": "readme"}
    before = set(list_losses())
    for block in re.findall(r"```python\n(.*?)```", section("One of your own"), flags=re.DOTALL):
        exec(block, namespace)
    return set(list_losses()) - before


def softplus(z):
    return math.log1p(math.exp(z))


def test_every_example_is_tried_here(examples):
    assert examples == {
        "my_loss",
        "from_the_policy_alone",
        "discounted_turns",
        "importance",
        "distilled",
        "against_the_mean",
    }


def test_the_first_example(examples):
    batch = pairs([4.0, -2.0], beta=0.5, score_chosen=[3.0, 0.5])
    expected = [2 * 3 * softplus(-2), 2 * 0.5 * softplus(1)]
    assert get_loss("mine", scale=2.0)(batch).tolist() == pytest.approx(expected)


def test_without_the_reference(examples):
    batch = dataclasses.replace(pairs([4.0]), ref_chosen_logps=None, ref_rejected_logps=None, beta=0.5)
    loss = get_loss("from_the_policy_alone")
    assert loss.reads == frozenset()
    assert loss(batch).tolist() == pytest.approx([softplus(-2)])  # log-probs -17.5 and -21.5


def test_tokens(examples):
    tokens = TokenBatch(
        chosen_logps=torch.tensor([[0.0, -1.0, -2.0, 0.0, -3.0]], dtype=torch.float64),
        rejected_logps=torch.tensor([[-1.0, 0.0, -4.0]], dtype=torch.float64),
        ref_chosen_logps=torch.tensor([[0.0, -2.0, -4.0, 0.0, -7.0]], dtype=torch.float64),
        ref_rejected_logps=torch.tensor([[-2.0, 0.0, -2.0]], dtype=torch.float64),
        chosen_turns=torch.tensor([[-1, 0, 0, -1, 1]]),
        rejected_turns=torch.tensor([[0, -1, 2]]),
    )
    loss = get_loss("discounted_turns", gamma=0.5)
    assert loss.reads == {"ref_logps", "token_logps"}
    # 1 + 2 + 0.5 * 4 = 5 against 1 - 0.25 * 2 = 0.5
    value = loss(dataclasses.replace(pairs([0.0], beta=0.5), tokens=tokens))
    assert value.tolist() == pytest.approx([softplus(-2.25)])
    assert value.dtype == torch.float64


def test_behaviour_log_probs(examples):
    loss = get_loss("importance", limit=math.log(2))
    assert (loss.reads, loss.takes_groups) == ({"behaviour_logps"}, True)
    batch = group([[0.0, math.log(1.5), math.log(9)], [0.0, 0.0, 0.0]], [[3.0, 0.0, 6.0], [1.0, 3.0, 5.0]])
    behaviour = torch.full((2, 3), -12.0, dtype=torch.float64)
    behaviour[1, 2] = math.nan
    mask = torch.tensor([[True, True, True], [True, True, False]])
    batch = dataclasses.replace(batch, ref_logps=None, mask=mask, behaviour_logps=behaviour)
    # Ratios 1, 1.5 and 9, cut at 2; scores less their means of 3 and 2
    value = loss(batch)
    assert value.tolist() == pytest.approx([-(0 - 1.5 * 3 + 2 * 3) / 3, -(-1 + 1) / 2])
    value.sum().backward()
    # The ratio times the score less the mean, over the count, with a minus; none where it is cut, or outside of the mask
    assert batch.logps.grad.tolist() == [pytest.approx([0, 1.5, 0]), pytest.approx([0.5, -0.5, 0])]


def test_teachers(examples):
    loss = get_loss("distilled")
    assert loss.reads == {"teachers"}
    halves, quarters = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    # 1/2 log((1/2) / (1/4)) + 1/2 log((1/2) / (3/4))
    value = loss.per_token(halves, quarters, None)
    assert value.tolist() == pytest.approx([math.log(2) - math.log(3) / 2])
    batch = dataclasses.replace(pairs([4.0, 1.0]), chosen_divergences=torch.tensor([14.0, 3.5]))
    assert loss(batch).tolist() == [2.0, 0.5]


@pytest.mark.parametrize(
    ("here", "there", "mean"),
    [
        ([1.0, 2.0, 3.0], [10.0], 0.85),  # 0.9 * 0.5 + 0.1 * 16 / 4; a mean of the means would be 0.9 * 0.5 + 0.1 * 6
        ([1.0, 2.0, 3.0], [], 0.65),
        ([], [], 0.5),
    ],
)
def test_state_is_the_same_on_two_processes(here, there, mean, examples):
    loss = get_loss("against_the_mean")
    old = {"mean": torch.tensor(0.5)}
    sums = []
    for deltas in (here, there):
        loss.update(old, pairs(deltas), reduce=lambda own: sums.append(own) or own)

    def added(own, other):
        return {name: own[name] + other[name] for name in own}

    for deltas, other in ((here, sums[1]), (there, sums[0])):
        new = loss.update(old, pairs(deltas), reduce=functools.partial(added, other=other))
        assert {name: value.tolist() for name, value in new.items()} == {"mean": pytest.approx(mean)}
        assert (new["mean"].dtype, new["mean"].shape) == (torch.float32, ())
    assert old == {"mean": torch.tensor(0.5)}


def test_state_by_hand_on_one_process(examples):
    loss = get_loss("against_the_mean", momentum=0.5)
    batch = pairs([4.0, 2.0], beta=0.5)
    state = loss.init_state()
    assert state == {"mean": torch.tensor(0.0)}
    for mean in (1.5, 2.25):  # halfway from 0 to 3, and again
        state = loss.update(state, batch)
        assert state["mean"].item() == pytest.approx(mean)
    value = loss(dataclasses.replace(batch, state=state))
    assert value.tolist() == pytest.approx([softplus(-0.5 * 1.75), softplus(0.5 * 0.25)])
    assert value.dtype == torch.float64


def test_a_loss_that_says_nothing_reads_the_reference_and_keeps_no_state():
    @register_loss("silent")
    @dataclass
    class Silent:
        def __call__(self, batch):
            return batch.delta

    for loss in (Loss(), get_loss("silent"), get_loss("offset")):
        assert (loss.reads, loss.update_first) == (frozenset({"ref_logps"}), True)
        assert loss.init_state() == {}
        assert loss.update({}, pairs([1.0])) == {}
        assert loss.update({"a": 3}, pairs([1.0]), lambda sums: None) == {"a": 3}


def test_batches_hold_nothing_that_nobody_asked_for():
    one, other = pairs([1.0]), pairs([1.0])
    assert (one.state, one.tokens, one.chosen_divergences) == ({}, None, None)
    assert one.state is not other.state
    groups = group([[1.0, 2.0]], [[0.0, 1.0]])
    assert (groups.state, groups.behaviour_logps, groups.divergences) == ({}, None, None)
    fields = [[field.name for field in dataclasses.fields(batch)] for batch in (PreferenceBatch, GroupBatch)]
    assert [names[-3:] for names in fields] == [
        ["state", "tokens", "chosen_divergences"],
        ["state", "behaviour_logps", "divergences"],
    ]
    assert [field.name for field in dataclasses.fields(TokenBatch)] == [
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_turns",
        "rejected_turns",
    ]


def stating(**statements):
    return dataclass(type("Stating", (), {"__call__": lambda self, batch: batch.delta, **statements}))


@pytest.mark.parametrize("kind", [set, list, tuple, frozenset])
def test_reads_of_any_kind_are_a_frozenset(kind):
    cls = register_loss("stating")(stating(reads=kind(["token_logps", "ref_logps"])))
    for reads in (cls.reads, get_loss("stating").reads):
        assert reads == {"token_logps", "ref_logps"}
        assert type(reads) is frozenset
    assert Loss.reads == {"ref_logps"}


ALLOWED = r"Allowed: \['ref_logps', 'token_logps', 'behaviour_logps', 'teachers'\]"


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (
            {"reads": ["token_logp"]},
            rf"Stating states that it reads 'token_logp', which is unknown. Did you mean 'token_logps'\? {ALLOWED}",
        ),
        ({"reads": {"ref_logps", "zzz"}}, rf"reads 'zzz', which is unknown. {ALLOWED}"),
        ({"reads": (3,)}, "reads 3, which is unknown"),
        ({"reads": "ref_logps"}, rf"states `reads = 'ref_logps'`; expected a set of names, .*{ALLOWED}"),
        ({"reads": None}, "states `reads = None`; expected a set of names"),
        (
            {"needs_reference": False},
            r"states `needs_reference`, which nothing reads. .* write `reads = frozenset\(\)`",
        ),
        ({"needs_reference": True}, "and nothing where it needs the reference"),
        ({"needs_reference": property(lambda self: False)}, "states `needs_reference`"),
        ({"init_state": lambda self: {"a": torch.zeros(())}}, "one of `init_state` and `update` without the other"),
        ({"update": lambda self, state, batch, reduce: state}, "one of `init_state` and `update` without the other"),
    ],
    ids=range(10),
)
def test_statements_that_are_refused(statements, message):
    before = list_losses()
    with pytest.raises(ValueError, match=message):
        register_loss("stating")(stating(**statements))
    assert list_losses() == before


def test_reads_may_depend_on_hyperparameters():
    @register_loss("depending")
    @dataclass(frozen=True)
    class Depending(Loss):
        update_first: ClassVar[bool] = False
        what: str = "ref_logps"

        @property
        def reads(self):
            return [self.what]

        def __call__(self, batch):
            return batch.delta

    assert list(get_loss("depending", what="token_logps").reads) == ["token_logps"]
    assert get_loss("depending").update_first is False
    with pytest.raises(ValueError, match=r"reads 'tokens', which is unknown\. Did you mean 'token_logps'"):
        get_loss("depending", what="tokens")
    assert isinstance(loss_class("depending").reads, property)
