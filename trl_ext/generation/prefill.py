"""The prompts' part of a key-value cache, computed once for all completions of a prompt."""

import inspect

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


def last_logits(model: nn.Module) -> dict[str, int]:
    """The argument that makes a model compute the logits of the last position alone, if it has one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(base).forward).parameters else {}


def prefill(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, copies: int) -> DynamicCache:
    """The cache of all prompt tokens but the last, each prompt's copied."""
    cache = DynamicCache(config=model.config.get_text_config())
    model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions(mask)[:, :-1],
        past_key_values=cache,
        use_cache=True,
        **last_logits(model),
    )
    cache.batch_repeat_interleave(copies)
    return cache
