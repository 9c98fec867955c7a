"""Batches with the columns that losses read, whatever collator makes the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.data.reasoning import EMPTY_TRACE_FIELDS, EMPTY_TRACE_PREFIX


@dataclass
class PreferenceCollator:
    """
    Wraps a collator: its batches, plus numeric columns and the empty-trace pair.

    Args:
        collator (`Callable`):
            TRL's collator or the user's own; it sees every example as it is.
        columns (`Sequence[str]`):
            Numeric columns: each becomes a float32 tensor of shape `(B,)` under its name.
        empty_trace (`bool`, *optional*, defaults to `False`):
            Whether to collate the empty-trace pair as well; its keys get the prefix `empty_trace_`.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    columns: Sequence[str]
    empty_trace: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        # Read first: TRL's vision collator changes the examples
        columns = {name: torch.tensor([float(example[name]) for example in examples]) for name in self.columns}
        empty = []
        if self.empty_trace:
            empty = [
                {
                    name: example[EMPTY_TRACE_PREFIX + name]
                    for name in EMPTY_TRACE_FIELDS
                    if EMPTY_TRACE_PREFIX + name in example
                }
                for example in examples
            ]
        batch = self.collator(examples)
        batch.update(columns)
        if self.empty_trace:
            batch.update({EMPTY_TRACE_PREFIX + name: value for name, value in self.collator(empty).items()})
        return batch
