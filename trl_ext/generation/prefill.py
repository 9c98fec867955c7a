"""The prompts' part of a key-value cache, computed once for all completions of a prompt."""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def can_copy_cache(model: nn.Module, config: GenerationConfig) -> bool:
    text = model.config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ())
    return (
        config.use_cache is not False
        and config.cache_implementation is None
        and (config.num_beams or 1) == 1
        and not getattr(model, "_is_stateful", False)
        and not getattr(text, "is_encoder_decoder", False)
        and layers <= {"full_attention", "sliding_attention"}
        # Virtual tokens of prompt-learning adapters lie in front of the prompt
        and not any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values())
    )


def last_logits(model: Callable) -> dict[str, int]:
    """The argument that makes a model compute the logits of the last position alone, if it has one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = base.forward if isinstance(base, nn.Module) else base
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}


def prefill(model: Callable, ids: torch.Tensor, mask: torch.Tensor, copies: int) -> DynamicCache:
    """
    The cache of all prompt tokens but the last, each prompt's copied.

    The model runs once, so that the processes of one that is sharded stay together, though prompts of one token leave nothing.
    """
    cache, length = DynamicCache(config=model.config.get_text_config()), max(ids.size(1) - 1, 1)
    model(
        input_ids=ids[:, :length],
        attention_mask=mask[:, :length],
        position_ids=positions(mask)[:, :length],
        past_key_values=cache,
        use_cache=True,
        **last_logits(model),
    )
    if ids.size(1) == 1:
        return DynamicCache(config=model.config.get_text_config())
    cache.batch_repeat_interleave(copies)
    return cache
