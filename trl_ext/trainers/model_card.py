"""What the model card says beside TRL's text."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel


# How TRL's card names a model that was loaded from a local folder
UNNAMED = "[None](https://huggingface.co/None)"


def complete_model_card(folder: str, model: PreTrainedModel, losses: str = "") -> None:
    """
    Name the base model where TRL's card does not, and add the table of losses.

    Args:
        folder (`str`):
            Where the card lies, as `README.md`.
        model ([`~transformers.PreTrainedModel`]):
            The model, which knows where it was loaded from.
        losses (`str`, *optional*):
            Markdown from [`describe_losses`].
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    # The name of the folder alone: where it lies is nobody's business
    name = Path(getattr(model.config, "_name_or_path", "") or "").name
    card.text = card.text.replace(UNNAMED, f"the local model `{name}`" if name else "a model that has no name", 1)
    if losses:
        card.text = card.text.replace("### Framework versions", f"{losses}\n\n### Framework versions", 1)
    card.save(path)


def describe_losses(weights: Mapping[str, float], losses: Mapping[str, Any], beta: float) -> str:
    """
    A table of the losses of a run, with weights, hyper-parameters and papers.

    Args:
        weights (`dict[str, float]`):
            Weight of each loss, by name, TRL's own among them.
        losses (`dict[str, Loss]`):
            Those that are not TRL's.
        beta (`float`):
            DPO temperature.
    """
    lines = ["### Loss", "", "| loss | weight | hyper-parameters | paper |", "| --- | --- | --- | --- |"]
    for name, weight in weights.items():
        loss = losses.get(name)
        values = json.dumps(dataclasses.asdict(loss), default=str) if loss else ""
        papers = [paper.strip() for paper in loss.paper.split(",") if paper] if loss else []
        links = ", ".join(f"[{paper}](https://huggingface.co/papers/{paper})" for paper in papers)
        lines.append(f"| `{name}` | {weight} | {f'`{values}`' if values else ''} | {links} |")
    return "\n".join([*lines, "", f"With [trl_ext](https://pypi.org/project/trl-ext/), `beta={beta}`."])
