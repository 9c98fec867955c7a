"""A loss that remembers, for tests: DPO around a running mean of delta."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import trl_ext
from trl_ext.losses import registry
from trl_ext.losses.base import Loss


def keep_registry(monkeypatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))


@dataclass(frozen=True)
class Centred(Loss):
    """`-log sigma(beta (delta - mean))`, where `mean` moves as `momentum * mean + (1 - momentum) * that of the micro-batch`."""

    momentum: float = 0.5

    def __call__(self, batch) -> torch.Tensor:
        return -F.logsigmoid(batch.beta * (batch.delta - batch.state["mean"]))

    def metrics(self, batch) -> dict[str, torch.Tensor]:
        return {"centre": batch.state["mean"]}

    def init_state(self) -> dict[str, torch.Tensor]:
        return {"mean": torch.zeros(()), "batches": torch.zeros((), dtype=torch.long)}

    def update(
        self, state: Mapping[str, torch.Tensor], batch, reduce: Callable[[dict], dict] = lambda sums: sums
    ) -> dict[str, torch.Tensor]:
        sums = reduce(
            {"sum": batch.delta.sum().to(state["mean"].dtype), "count": torch.tensor(float(len(batch.delta)))}
        )
        mean = self.momentum * state["mean"] + (1 - self.momentum) * sums["sum"] / sums["count"]
        return {"mean": mean, "batches": state["batches"] + 1}


@dataclass(frozen=True)
class CentredBefore(Centred):
    """The same, reading the mean as it was before the micro-batch."""

    update_first: ClassVar[bool] = False


@dataclass(frozen=True)
class Selfish(Centred):
    """The same, of a field of the batch, with an `update` that sees the rows of its own process alone."""

    field: str = "delta"

    def update(self, state, batch, reduce=None):
        mean = self.momentum * state["mean"] + (1 - self.momentum) * getattr(batch, self.field).mean()
        return {"mean": mean, "batches": state["batches"] + 1}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """While open, they can be named: `centred`, `centred_before` and `selfish`."""
    with pytest.MonkeyPatch.context() as patch:
        keep_registry(patch)
        for name, kind in {"centred": Centred, "centred_before": CentredBefore, "selfish": Selfish}.items():
            trl_ext.register_loss(name)(kind)
        yield
