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
        groups (`bool`, *optional*, defaults to `False`):
            Whether to collate the other completions of each group: `others`, a list of batches of two completions each,
            `other_scores` and `other_mask` of shape `(B, K - 2)`, and `other_ref_logps` where precomputed.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    columns: Sequence[str]
    empty_trace: bool = False
    groups: bool = False

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
        others = self._others(examples) if self.groups else {}
        batch = self.collator(examples)
        batch.update(columns)
        batch.update(others)
        if self.empty_trace:
            batch.update({EMPTY_TRACE_PREFIX + name: value for name, value in self.collator(empty).items()})
        return batch

    def _others(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        count = max(len(example["other_ids"]) for example in examples)
        count += count % 2
        empty = {"prompt_ids": [], "ids": [], "scores": 0.0, "ref_logps": 0.0}

        def entry(example: dict[str, Any], field: str, k: int) -> Any:
            values = example[f"other_{field}"]
            # A place that a smaller group leaves empty has the group's prompt and nothing to score
            return values[k] if k < len(values) else (example["prompt_ids"] if field == "prompt_ids" else empty[field])

        batches = [
            self.collator(
                [
                    {
                        "prompt_ids": entry(example, "prompt_ids", k),
                        "chosen_ids": entry(example, "ids", k),
                        "rejected_ids": entry(example, "ids", k + 1),
                    }
                    for example in examples
                ]
            )
            for k in range(0, count, 2)
        ]
        fields = ["scores"] + (["ref_logps"] if "other_ref_logps" in examples[0] else [])
        return {
            "others": batches,
            "other_mask": torch.tensor(
                [[k < len(example["other_ids"]) for k in range(count)] for example in examples], dtype=torch.bool
            ).reshape(len(examples), count),
            **{
                f"other_{field}": torch.tensor(
                    [[float(entry(e, field, k)) for k in range(count)] for e in examples]
                ).reshape(len(examples), count)
                for field in fields
            },
        }
