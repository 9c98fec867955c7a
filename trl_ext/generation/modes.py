"""What a model is for the time in which it is sampled from."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import GenerationConfig


@contextlib.contextmanager
def evaluating(model: nn.Module, checkpointing_kwargs: dict | None) -> Iterator[None]:
    """Evaluation mode, without gradients or gradient checkpointing; everything as before afterwards, errors included."""
    training, checkpointing = model.training, getattr(model, "is_gradient_checkpointing", False)
    model.eval()
    if checkpointing:
        model.gradient_checkpointing_disable()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        if checkpointing and not model.is_gradient_checkpointing:
            model.gradient_checkpointing_enable(checkpointing_kwargs)


@contextlib.contextmanager
def without_defaults(model: nn.Module) -> Iterator[None]:
    """
    The model without its own `generation_config`; as before afterwards.

    `generate` takes from there whatever a config leaves unset: penalties, blocked n-grams, forced tokens. Without it the config
    alone decides, and samples come from the model's distribution.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = [(each, each.generation_config) for each in (model, base)]
    for each, _ in before:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, config in before:
            each.generation_config = config
