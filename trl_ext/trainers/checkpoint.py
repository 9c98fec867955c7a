"""Which losses a checkpoint was trained with."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


FILE = "losses.json"


def _described(weights: Mapping[str, float], losses: Mapping[str, Any]) -> dict[str, Any]:
    """Each loss with its weight and hyper-parameters, as JSON has it."""
    described = {
        name: {"weight": weight, **(dataclasses.asdict(losses[name]) if name in losses else {})}
        for name, weight in weights.items()
    }
    return json.loads(json.dumps(described, default=str))


def save_losses(folder: str | Path, weights: Mapping[str, float], losses: Mapping[str, Any]) -> None:
    """
    Write what [`refuse_other_losses`] reads.

    Args:
        folder (`str` or `Path`):
            The checkpoint.
        weights (`dict[str, float]`):
            Weight of each loss, by name.
        losses (`dict[str, Loss]`):
            Those that have hyper-parameters, by name.
    """
    (Path(folder) / FILE).write_text(json.dumps(_described(weights, losses), indent=2) + "\n")


def refuse_other_losses(folder: str | Path, weights: Mapping[str, float], losses: Mapping[str, Any]) -> None:
    """
    Raise a `ValueError` if the checkpoint was trained with other losses than those given.

    A checkpoint that says nothing of losses, such as one of TRL's own trainer, passes.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), _described(weights, losses)
    if before != now:
        raise ValueError(
            f"The checkpoint {folder} was trained with the losses {before}, and this run has {now}. A resumed run continues "
            "the same objective: restore these settings, or start a new run from the checkpoint's model (`model=` that "
            "folder, without `resume_from_checkpoint`)."
        )
