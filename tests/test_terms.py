"""The losses of a run: their weights, what they remember, and what they are refused, by hand."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.stateful import Centred, CentredBefore
from trl_ext.losses import get_loss
from trl_ext.losses.base import Loss
from trl_ext.rows import Plan, Scored
from trl_ext.trainers import terms as module
from trl_ext.trainers.terms import Terms


def scored(*deltas):
    """Pairs whose delta is as given: chosen rows, then rejected ones, under a reference of zeros."""
    logps = torch.tensor([*deltas, *[0.0] * len(deltas)], dtype=torch.float64)
    return Scored(logps, torch.ones(len(logps), dtype=torch.long), torch.zeros_like(logps))


def plan(rows, **fields):
    return Plan(torch.arange(2 * rows).view(2, rows).T, **fields)


def alone(sums):
    return sums


def step(terms, *deltas, beta=0.5, training=True, reduce=alone, **fields):
    total, metrics, each = terms.total(scored(*deltas), plan(len(deltas), **fields), beta, training, reduce)
    return total.item(), metrics, each


def dpo(beta, *margins):
    """Mean of `-log sigma(beta * margin)`."""
    return sum(math.log1p(math.exp(-beta * margin)) for margin in margins) / len(margins)


# Means of the micro-batches are 1, 2 and -1: from 0 with momentum 1/2 the state moves to 0.5, 1.25 and 0.125
BATCHES = [(2.0, 0.0), (4.0, 0.0), (-1.0, -1.0)]
STATES = [0.0, 0.5, 1.25, 0.125]


@pytest.mark.parametrize("loss", [Centred(), CentredBefore()], ids=["update first", "update after"])
def test_three_steps_by_hand(loss):
    terms = Terms({"centred": loss}, {"centred": 2.0})
    for index, deltas in enumerate(BATCHES):
        read = STATES[index + 1 if loss.update_first else index]
        total, metrics, each = step(terms, *deltas)
        expected = dpo(0.5, *(delta - read for delta in deltas))
        assert each["loss/centred"].item() == pytest.approx(expected, rel=1e-12)
        assert total == pytest.approx(2 * expected, rel=1e-12) and metrics["centre"].item() == read
        assert terms.state["centred"]["mean"].item() == STATES[index + 1]
        assert terms.state["centred"]["batches"].item() == index + 1


@pytest.mark.parametrize("loss", [Centred(), CentredBefore()], ids=["update first", "update after"])
def test_evaluation_reads_the_state_and_leaves_it_alone(loss):
    terms = Terms({"centred": loss}, {"centred": 1.0})
    step(terms, 2.0, 0.0)
    for _ in range(2):
        total, metrics, _ = step(terms, 4.0, 0.0, training=False)
        assert total == pytest.approx(dpo(0.5, 3.5, -0.5), rel=1e-12) and metrics["centre"].item() == 0.5
    assert terms.state["centred"]["batches"].item() == 1


def test_each_of_several_has_its_own_state():
    losses = {
        "slow": Centred(momentum=0.75),
        "plain": get_loss("length_regularized"),
        "quick": CentredBefore(momentum=0.0),
    }
    terms = Terms(losses, {"slow": 1.0, "plain": 1.0, "quick": 10.0})
    assert set(terms.state) == {"slow", "quick"}
    step(terms, 2.0, 0.0)
    total, metrics, each = step(terms, 4.0, 0.0)
    # Means 1 and 2: slow 0.25, then 0.6875; quick 1, then 2, of which the second step reads the first
    assert terms.state["slow"]["mean"].item() == 0.6875 and terms.state["quick"]["mean"].item() == 2.0
    assert metrics["centre"].item() == 0.6875 and metrics["quick/centre"].item() == 1.0
    parts = {"slow": dpo(0.5, 4 - 0.6875, -0.6875), "quick": dpo(0.5, 3.0, -1.0), "plain": dpo(0.5, 4.0, 0.0)}
    for name, expected in parts.items():
        assert each[f"loss/{name}"].item() == pytest.approx(expected, rel=1e-12)
    assert total == pytest.approx(parts["slow"] + parts["plain"] + 10 * parts["quick"], rel=1e-12)


def test_sums_go_through_reduce():
    """The other process has three rows that add up to 9."""
    others = {"sum": 9.0, "count": 3.0}
    terms = Terms({"centred": Centred()}, {"centred": 1.0})
    step(terms, 1.0, reduce=lambda sums: {name: value + others[name] for name, value in sums.items()})
    assert terms.state["centred"]["mean"].item() == 0.5 * (1 + 9) / (1 + 3)


def test_gradients_do_not_flow_through_the_state():
    known = scored(2.0, 0.0)
    known.logps.requires_grad_()
    terms = Terms({"centred": Centred()}, {"centred": 1.0})
    total, _, _ = terms.total(known, plan(2), 0.5, True, alone)
    total.backward()
    # -beta sigma(-beta (delta - 0.5)) / 2, as if the mean were a number
    expected = [-0.25 / (1 + math.exp(0.5 * (delta - 0.5))) for delta in (2.0, 0.0)]
    assert known.logps.grad[:2].tolist() == pytest.approx(expected, rel=1e-12)
    assert not terms.state["centred"]["mean"].requires_grad


@pytest.mark.parametrize("rows_elsewhere", [0, 2])
def test_a_micro_batch_without_rows(rows_elsewhere):
    """Where another process has some, the state moves here too; where none has, it stands."""
    moves = []

    def reduce(sums):
        if "rows" in sums:
            return {"rows": sums["rows"] + rows_elsewhere}
        moves.append(sums)
        return {"sum": sums["sum"] + 6.0, "count": sums["count"] + rows_elsewhere}

    terms = Terms({"centred": Centred()}, {"centred": 1.0}, can_be_empty=True)
    total, metrics, each = step(terms, reduce=reduce)
    assert total == 0.0 and not metrics and each == {"loss/centred": 0.0}  # of which the mean over processes is one
    assert len(moves) == (1 if rows_elsewhere else 0)
    assert terms.state["centred"]["mean"].item() == (1.5 if rows_elsewhere else 0.0)


def test_the_share_and_the_number_of_pairs():
    """A pair counts its share; the sum is divided by the number of pairs, or by the one that is given."""
    terms = Terms({"plain": get_loss("length_regularized")}, {"plain": 1.0})
    one, other = dpo(0.5, 2.0), dpo(0.5, -1.0)
    share = torch.tensor([3.0, 0.5])
    assert step(terms, 2.0, -1.0)[0] == pytest.approx((one + other) / 2, rel=1e-12)
    assert step(terms, 2.0, -1.0, share=share)[0] == pytest.approx((3 * one + 0.5 * other) / 2, rel=1e-12)
    assert step(terms, 2.0, -1.0, share=share, count=5)[0] == pytest.approx((3 * one + 0.5 * other) / 5, rel=1e-12)


def test_what_a_run_reads_is_what_any_of_its_losses_reads():
    class Without(Loss):
        reads = frozenset()

    class Tokens(Loss):
        reads = frozenset({"token_logps"})

    def reads(losses, theirs=()):
        return Terms({loss.__name__: loss() for loss in losses}, {}, dict.fromkeys(theirs, 1.0)).reads

    assert reads([Without]) == set()
    assert reads([Without, Tokens]) == {"token_logps"}
    assert reads([Without, Loss]) == reads([Without], ["sft"]) == reads([], ["sigmoid"]) == reads([]) == {"ref_logps"}


# Refused


class Keeps(Centred):
    """Gives back what it is told to."""

    def update(self, state, batch, reduce=alone):
        return self.given


@pytest.mark.parametrize(
    "given",
    [
        {"mean": torch.zeros(())},
        {"mean": torch.zeros(()), "batches": torch.zeros((), dtype=torch.long), "more": torch.zeros(())},
        {"mean": torch.zeros(1), "batches": torch.zeros((), dtype=torch.long)},
        {"mean": torch.zeros((), dtype=torch.float64), "batches": torch.zeros((), dtype=torch.long)},
    ],
    ids=["a name less", "a name more", "another shape", "another dtype"],
)
def test_a_state_of_another_form_is_refused(given):
    loss = Keeps()
    object.__setattr__(loss, "given", given)
    with pytest.raises(
        ValueError, match=r"`update` of the loss 'keeps' gave the state .*expected that of `init_state`"
    ):
        step(Terms({"keeps": loss}, {"keeps": 1.0}), 1.0)


def test_a_state_that_differs_between_processes_is_refused(monkeypatch):
    asked = []

    def gather(objects):
        asked.append(objects)
        return objects + others

    monkeypatch.setattr(module, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(module, "gather_object", gather)
    terms = Terms({"centred": Centred()}, {"centred": 1.0})
    others = []
    for _ in range(9):
        step(terms, 1.0)
    # After the first update, the second, the fourth and so on: seldom
    assert [sent[0]["batches"] for sent in asked] == [1, 2, 4, 8] and asked[1][0]["mean"] == 0.75
    others = [{"mean": 0.25, "batches": 1}]
    with pytest.raises(ValueError, match=r"state of the loss 'centred' differs between processes.*through `reduce`"):
        step(Terms({"centred": Centred()}, {"centred": 1.0}), 1.0)


@dataclasses.dataclass(frozen=True)
class Measured(Loss):
    """Says of a batch what it is told to."""

    said: object = None

    def __call__(self, batch):
        return batch.delta

    def metrics(self, batch):
        return {"said": self.said}


def test_metrics_are_numbers_or_one_per_row():
    for said in (1.0, 2, torch.tensor(3.0), torch.zeros(2)):
        loss = Measured()
        object.__setattr__(loss, "said", said)
        assert step(Terms({"measured": loss}, {"measured": 1.0}), 1.0, 2.0)[1]["said"] is said
    object.__setattr__(loss, "said", torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"metric 'said' of the loss 'measured' has shape \(3,\); expected a number, or \(2,\)"
    ):
        step(Terms({"measured": loss}, {"measured": 1.0}), 1.0, 2.0)


# Checkpoints


def test_what_is_saved_is_read_back(tmp_path):
    def fresh(**weights):
        losses = {"slow": Centred(momentum=0.75), "quick": CentredBefore(), "plain": get_loss("length_regularized")}
        return Terms(losses, {"slow": 1.0, "quick": 1.0, "plain": 1.0, **weights}, {"sft": 0.5})

    saved = fresh()
    step(saved, 2.0, 0.0)
    saved.save(tmp_path)
    read = fresh()
    read.load(tmp_path)
    assert read.state == saved.state and read.state["slow"]["mean"].item() == 0.25
    assert read.state["slow"]["batches"].dtype == torch.long
    with pytest.raises(ValueError, match="was trained with the losses"):
        fresh(quick=2.0).load(tmp_path)
    (tmp_path / "loss_state.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"holds the state \{\} of losses; this run needs \{'quick/batches': \(\(\), torch.int64\), 'quick/mean':",
    ):
        fresh().load(tmp_path)
    # Of the same names but another dtype, such as an earlier version of a loss wrote
    kept = {f"{name}/{key}": value.clone() for name, state in saved.state.items() for key, value in state.items()}
    save_file({**kept, "slow/mean": kept["slow/mean"].double()}, tmp_path / "loss_state.safetensors")
    with pytest.raises(
        ValueError, match=r"'slow/mean': \(\(\), torch.float64\).* needs .*'slow/mean': \(\(\), torch.float32\)"
    ):
        fresh().load(tmp_path)
    (tmp_path / "loss_state.safetensors").unlink()
    # Where no loss keeps state, none is written and none is missed
    plain = Terms({"plain": get_loss("length_regularized")}, {"plain": 1.0})
    plain.save(tmp_path)
    assert not (tmp_path / "loss_state.safetensors").exists()
    plain.load(tmp_path)


class Twins(Centred):
    """Begins with one tensor under two names, as a loss that keeps a mean and a deviation of 0 may."""

    def init_state(self):
        zero = torch.zeros(())
        return {"mean": zero, "batches": zero}


def test_one_tensor_under_two_names_is_saved(tmp_path):
    def fresh():
        return Terms({"twins": Twins()}, {"twins": 1.0})

    fresh().save(tmp_path)  # before the first step, as a run may that saves at once
    read = fresh()
    read.load(tmp_path)
    assert read.state["twins"] == {"mean": torch.zeros(()), "batches": torch.zeros(())}
