"""
Micro-batches that are generated for together.

The policy does not change between two optimizer steps, so what it writes for all of them can be written at once: each token then
reads the weights once for all rows. A block holds the micro-batches of one generation; what they are learnt from is cut out of it.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from trl_ext.generation import Completions
from trl_ext.trainers.online.rewards import Scores
from trl_ext.trainers.online.selection import Selection, Table


# Where a micro-batch holds its place in a block
BLOCK = "block"


@dataclass
class Known:
    """
    What is known of a micro-batch's table before it is learnt from, or was when it was learnt from last.

    Attributes:
        ref_token_logps (`torch.Tensor` of shape `(N, T - 1)`, *optional*):
            Log-probability of each token under the reference, in nats.
        ref_step (`int`, *optional*):
            The optimizer step that the reference was asked at.
        behaviour_logps (`torch.Tensor` of shape `(N,)`, *optional*):
            Log-probability of each completion under the policy that sampled it, in nats.
        table ([`~trl_ext.trainers.online.selection.Table`], *optional*):
            The table itself. It follows from the rest, and is not saved.
    """

    ref_token_logps: torch.Tensor | None = None
    ref_step: int | None = None
    behaviour_logps: torch.Tensor | None = None
    table: Table | None = field(default=None, metadata={"saved": False})


@dataclass
class Sampled:
    """
    What a micro-batch is learnt from.

    Attributes:
        selections (`list[Selection]`):
            One, or for `bias_variance` one with reasoning and one without.
        known ([`Known`]):
            What is known of its table.
    """

    selections: list[Selection]
    known: Known = field(default_factory=Known)


@dataclass
class Block:
    """
    Micro-batches of one generation.

    Attributes:
        batches (`list[dict[str, Any]]`):
            The micro-batches, as the data loader gives them; empty once they have been generated for.
        sampled (`list[Sampled | None]`):
            What each is learnt from; `None` before that is there, and when it is no longer needed.
    """

    batches: list[dict[str, Any]]
    sampled: list[Sampled | None]


@dataclass(frozen=True)
class Place:
    """
    Where a micro-batch stands.

    Attributes:
        block ([`Block`]):
            Its block.
        number (`int`):
            Its number in the block, from 0.
        last (`bool`):
            Whether it is learnt from for the last time.
    """

    block: Block
    number: int
    last: bool


class Blocks(TrainerCallback):
    """
    Hands out the micro-batches of a run, each with its place in a block.

    Args:
        length (`int`):
            Micro-batches of a block.
        uses (`int`):
            How often a block is learnt from: so often do its micro-batches come from the data loader, one time after the other.
    """

    def __init__(self, length: int, uses: int):
        self.length, self.uses = length, uses
        self.ready: deque[dict[str, Any]] = deque()
        self.block: Block | None = None
        self.use = 0  # which of its uses the block is in
        self.resumed = 0  # micro-batches of this use that a resumed run still has to take from the data loader
        self.loaded = False  # for the training that begins next

    def take(self, count: int, pull: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """
        The next micro-batches of an optimizer step.

        Args:
            count (`int`):
                How many; fewer at the end of an epoch.
            pull (`Callable`):
                Takes so many micro-batches, or what is left of them, from the data loader.
        """
        while len(self.ready) < count:
            first = 0
            if self.resumed:
                first, self.resumed = len(self.block.sampled) - self.resumed, 0
            elif self.block is not None and self.use < self.uses:
                self.use += 1
            else:
                self.block = None
            batches = pull(self.length if self.block is None else len(self.block.sampled) - first)
            if not batches:
                break
            if self.block is None:
                self.block, self.use = Block(batches, [None] * len(batches)), 1
            last = self.use == self.uses
            places = (Place(self.block, first + number, last) for number in range(len(batches)))
            self.ready += [{**batch, BLOCK: place} for batch, place in zip(batches, places, strict=True)]
        return [self.ready.popleft() for _ in range(min(count, len(self.ready)))]

    def forget(self) -> None:
        """Begin anew: what was taken and generated is of no use."""
        self.ready.clear()
        self.block, self.use, self.resumed = None, 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.loaded:
            self.forget()  # what is left of a training that failed
        self.loaded = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.forget()  # what is left of an epoch that was stopped

    def state(self) -> dict[str, Any] | None:
        """What a resumed run needs beside its data, for JSON; `None` where the next optimizer step begins a block."""
        left = len(self.ready) + self.resumed
        if self.block is None or (self.use == self.uses and not left):
            return None
        return {"use": self.use, "left": left, "sampled": [packed(each) for each in self.block.sampled]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on as the run did that `state` is of."""
        self.forget()
        self.block = Block([], [unpacked(each) for each in state["sampled"]])
        self.use, self.resumed, self.loaded = state["use"], state["left"], True


RECORDS = {record.__name__: record for record in (Sampled, Known, Selection, Scores, Completions)}


def packed(value: Any) -> Any:
    """A record as what JSON can hold; tensors to the bit."""
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if dataclasses.is_dataclass(value):
        saved = [each.name for each in dataclasses.fields(value) if each.metadata.get("saved", True)]
        fields = {name: packed(getattr(value, name)) for name in saved}
        return {"record": type(value).__name__, "fields": fields}
    if isinstance(value, dict):
        return {"dict": {name: packed(each) for name, each in value.items()}}
    return [packed(each) for each in value] if isinstance(value, list) else value


def unpacked(value: Any) -> Any:
    """What [`packed`] was given."""
    if isinstance(value, list):
        return [unpacked(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
    if "dict" in value:
        return {name: unpacked(each) for name, each in value["dict"].items()}
    return RECORDS[value["record"]](**{name: unpacked(each) for name, each in value["fields"].items()})


class RepeatedBlocks(Sampler):
    """
    The rows of a dataset in blocks, each of which comes several times.

    What is missing of a whole block at the end of an epoch is filled with its first rows, as accelerate fills batches.

    Args:
        rows (`int`):
            Of the dataset.
        size (`int`):
            Rows of a block, over all processes.
        times (`int`):
            How often each block comes.
        order (`Callable`):
            Gives the order of the rows in the epoch that begins.
    """

    def __init__(self, rows: int, size: int, times: int, order: Callable[[], list[int]]):
        self.rows, self.size, self.times, self.order = -(-rows // size) * size, size, times, order

    def __len__(self) -> int:
        return self.rows * self.times

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        order += [order[number % len(order)] for number in range(self.rows - len(order))]
        for start in range(0, self.rows, self.size):
            for _ in range(self.times):
                yield from order[start : start + self.size]
