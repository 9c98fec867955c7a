"""Losses of users and of installed packages that are no losses, or give back what nobody can learn from."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from tests.hostile.refusal import refused
from trl_ext import get_loss, register_loss
from trl_ext.data.columns import check_values
from trl_ext.generation.decoding import draw as drawn
from trl_ext.losses import base, plugin_errors, registry
from trl_ext.rows import Plan, Scored
from trl_ext.trainers.terms import Terms


NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def registry_as_it_was(monkeypatch):
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))


def dpo(batch: Any) -> torch.Tensor:
    return base.sigmoid(batch)


def loss_of(call: Callable = dpo, **statements: Any) -> type:
    """A user's dataclass."""
    return dataclass(frozen=True)(type("Mine", (), {"__call__": lambda self, batch: call(batch), **statements}))


def three_pairs(logps: Any = None) -> tuple[Scored, Plan]:
    logps = torch.tensor([-9.0, -8.0, -7.0, -6.0, -5.0, -4.0]) if logps is None else logps
    scored = Scored(logps.requires_grad_(), ref_logps=torch.full((6,), -6.5), lengths=torch.full((6,), 4))
    return scored, Plan(torch.arange(6).view(2, 3).T)


def step(cls: type, logps: Any = None) -> Any:
    terms = Terms({"mine": register_loss("mine")(cls)()}, {"mine": 1.0})
    return terms.total(*three_pairs(logps), 0.1, True, lambda sums: sums)


def first(batch: Any, value: float) -> torch.Tensor:
    """DPO with another value for the second pair."""
    return torch.where(torch.arange(3) == 1, value, dpo(batch))


ANSWERS: dict[str, tuple[Callable, str]] = {
    "a scalar": (lambda batch: dpo(batch).mean(), "returned shape ()"),
    "a column": (lambda batch: dpo(batch)[:, None], "returned shape (3, 1)"),
    "one too few": (lambda batch: dpo(batch)[1:], "returned shape (2,)"),
    "nothing": (lambda batch: None, "returned None, a NoneType"),
    "a number": (lambda batch: 3.0, "returned 3.0, a float"),
    "a list": (lambda batch: dpo(batch).tolist(), "a list; expected a tensor"),
    "a tuple": (lambda batch: (dpo(batch), {}), "a tuple; expected a tensor"),
    "an array": (lambda batch: dpo(batch).detach().numpy(), "a ndarray; expected a tensor"),
    "integers": (lambda batch: torch.ones(3, dtype=torch.long), "returned torch.int64 without a gradient"),
    "booleans": (lambda batch: dpo(batch) > 0, "returned torch.bool without a gradient"),
    "complex numbers": (lambda batch: dpo(batch) + 0j, "returned torch.complex64"),
    "detached": (lambda batch: dpo(batch).detach(), "returned torch.float32 without a gradient"),
    "NaN": (lambda batch: dpo(batch) * NAN, "returned nan for row 0 of its first micro-batch"),
    "infinity": (lambda batch: dpo(batch) * INF, "returned inf for row 0"),
    "one NaN": (lambda batch: first(batch, NAN), "returned nan for row 1"),
    "one infinity": (lambda batch: first(batch, -INF), "returned -inf for row 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_what_a_loss_returns(name, tmp_path):
    call, said = ANSWERS[name]
    refused(lambda: step(loss_of(call)), said, tmp_path)
    if "gradient" not in said:  # in evaluation there is none
        with torch.no_grad():
            refused(lambda: step(loss_of(call)), said, tmp_path)


def test_a_policy_of_nan(tmp_path):
    weights = torch.tensor([-9.0, NAN, -7.0, -6.0, -5.0, -4.0])
    refused(lambda: step(loss_of(), weights), "The policy's log-probabilities of the first micro-batch", tmp_path)


def test_what_is_right_is_learnt_from():
    total, metrics, _ = step(loss_of(metrics=lambda self, batch: {"a": 1, "b": True, "c": torch.zeros(3)}))
    assert total.requires_grad and metrics["a"] == 1


METRICS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "gave None"),
    "a list": ([1.0], "gave [1.0]"),
    "text": ({"a": "b"}, "gave 'a': 'b'"),
    "null": ({"a": None}, "gave 'a': None"),
    "a list of numbers": ({"a": [1]}, "gave 'a': [1]"),
    "a number as name": ({3: 1.0}, "gave 3: 1.0"),
    "a matrix": ({"a": torch.zeros(3, 2)}, "has shape (3, 2)"),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name, tmp_path):
    given, said = METRICS[name]
    refused(lambda: step(loss_of(metrics=lambda self, batch: given)), said, tmp_path)


def moves(state: Any, after: Any = "the same") -> type:
    update = lambda self, before, batch, reduce=None: before if after == "the same" else after  # noqa: E731
    return loss_of(init_state=lambda self: state, update=update)


STATES: dict[str, tuple[Any, str]] = {
    "a list": (moves([1.0]), "`init_state` of the loss 'mine' gave [1.0]"),
    "numbers": (moves({"a": 1.0}), "gave {'a': 1.0}"),
    "numbers as names": (moves({3: torch.zeros(())}), "gave {3: tensor(0.)}"),
    "nothing after": (moves({"a": torch.zeros(())}, None), "`update` of the loss 'mine' gave None"),
    "a number after": (moves({"a": torch.zeros(())}, {"a": 0.0}), "`update` of the loss 'mine' gave {'a': 0.0}"),
    "other names after": (moves({"a": torch.zeros(())}, {"b": torch.zeros(())}), "expected that of `init_state`"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_states(name, tmp_path):
    cls, said = STATES[name]
    refused(lambda: step(cls), said, tmp_path)


STATEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "columns text": ({"columns": "score_chosen"}, "states `columns = 'score_chosen'`"),
    "columns numbers": ({"columns": (3,)}, "states `columns = (3,)`"),
    "columns null": ({"columns": None}, "states `columns = None`"),
    "optional columns null": ({"optional_columns": None}, "states `optional_columns = None`"),
    "reads text": ({"reads": "ref_logps"}, "states `reads = 'ref_logps'`"),
    "paper a number": ({"paper": 2402.0}, "states `paper = 2402.0`"),
    "title null": ({"title": None}, "states `title = None`"),
    "evidence a number": ({"evidence": 3}, "states `evidence = 3`"),
    "groups text": ({"takes_groups": "yes"}, "states `takes_groups = 'yes'`"),
    "order text": ({"update_first": "no"}, "states `update_first = 'no'`"),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_statements(name, tmp_path):
    given, said = STATEMENTS[name]
    refused(lambda: register_loss("mine")(loss_of(**given)), said, tmp_path)


@pytest.mark.parametrize("answer", ["bad rows", torch.zeros(2), [True, False, False]])
def test_rows_that_a_loss_cannot_take(answer, tmp_path):
    loss = register_loss("mine")(loss_of(columns=("q",), check_columns=lambda self, columns: answer))()
    said = f"`check_columns` of the loss {type(loss).__qualname__} gave"
    refused(lambda: check_values({"q": [1.0, 2.0, 3.0]}, {"mine": loss}, "train"), said, tmp_path)


class Offered(EntryPoint):
    """An entry point of which one says what loading it does."""

    def load(self) -> Any:
        return LOADS[self.name.removeprefix("their_")][0]()


def raises(error: BaseException) -> Callable:
    def load() -> None:
        raise error

    return load


LOADS: dict[str, tuple[Callable, str]] = {
    "error": (raises(RuntimeError("boom")), "boom"),
    "import": (raises(ImportError("no torch")), "no torch"),
    "exit": (raises(SystemExit(3)), "3"),
    "recursion": (raises(RecursionError("deep")), "deep"),
    "silent": (raises(ValueError()), "ValueError()"),
    "nothing": (lambda: None, "got None"),
    "number": (lambda: 3, "got 3"),
    "module": (lambda: os, "got <module 'os'"),
    "function": (lambda: dpo, "got <function dpo"),
    "class": (lambda: dict, "got <class 'dict'>"),
    "object": (lambda: loss_of()(), "got Mine()"),
    "statement": (lambda: loss_of(columns="a"), "states `columns = 'a'`"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_entry_points(name, tmp_path, monkeypatch):
    entry = Offered(f"their_{name}", f"theirs.losses:{name}", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    said = LOADS[name][1]
    refused(lambda: get_loss(f"their_{name}"), said, tmp_path)
    (reason,) = plugin_errors()  # the others, and the list of losses, are there all the same
    assert said in reason and f"theirs.losses:{name}" in reason
    assert get_loss("offset").alpha == 1.0


@pytest.mark.parametrize(
    ("name", "said"), [("", "''"), ("a b", "'a b'"), ("ipo", "TRL has it"), ("offset", "OffsetLoss has it")]
)
def test_names_of_entry_points(name, said, monkeypatch):
    entry = Offered(name, "theirs.losses:error", registry.ENTRY_POINT_GROUP)
    monkeypatch.setitem(LOADS, name, (loss_of, ""))
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    (reason,) = plugin_errors()
    assert said in reason


def test_logits_of_nan_cannot_be_drawn_from(tmp_path):
    scores, points = torch.zeros(2, 5), torch.full((2, 1), 0.5, dtype=torch.float64)
    assert drawn(scores, points).tolist() == [[2], [2]]
    scores[1, 3] = NAN
    refused(lambda: drawn(scores, points), "The model's logits are not finite", tmp_path)
