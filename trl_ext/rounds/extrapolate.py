"""Weights between rounds."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def extrapolate(trained: str | Path, before: str | Path, alpha: float, output: str | Path) -> None:
    """
    Save `trained + alpha * (trained - before)`: Nesterov's step between rounds, in weight space.

    Accelerated preference optimisation (https://huggingface.co/papers/2410.06293); whether its authors extrapolate weights or
    logits, and by how much, is not confirmed. `alpha = 0` copies.

    Args:
        trained (`str` or `Path`):
            Folder of the model that this round trained.
        before (`str` or `Path`):
            Folder of the one that the round before trained.
        alpha (`float`):
            How far to go beyond it.
        output (`str` or `Path`):
            Folder of the result.
    """
    model = AutoModelForCausalLM.from_pretrained(trained, dtype="auto")
    other = dict(AutoModelForCausalLM.from_pretrained(before, dtype="auto").named_parameters())
    names = {name for name, _ in model.named_parameters()}
    if names != set(other):
        raise ValueError(f"{trained} and {before} have different parameters: {sorted(names ^ set(other))[:4]} ...")
    with torch.no_grad():
        for name, value in model.named_parameters():
            # In float32: the difference of two bfloat16 models is below their resolution
            moved = value.float() + alpha * (value.float() - other[name].float())
            value.copy_(moved.to(value.dtype))
    model.save_pretrained(output)
