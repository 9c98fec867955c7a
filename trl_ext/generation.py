"""Sampling completions: a key-value cache, one prefill per prompt, and the geometric mixture of two models."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.integrations import is_deepspeed_zero3_enabled


@dataclass
class Completions:
    """
    `K` completions of each of `B` prompts, in blocks: completion `k` of prompt `b` is number `k B + b`.

    Attributes:
        prompts (`list`):
            The `B` prompts as the dataset has them.
        texts (`list`):
            The completions as reward functions see them: strings, or lists of one message.
        prompt_ids (`list[torch.Tensor]`):
            Tokens of each prompt.
        ids (`list[torch.Tensor]`):
            Tokens of each completion, the end-of-sequence token included where there is one.
        ended (`torch.Tensor` of shape `(K B,)`):
            Whether the completion ended by itself.
        vision (`dict`, *optional*):
            Image tensors, repeated for each completion.
    """

    prompts: list
    texts: list
    prompt_ids: list[torch.Tensor]
    ids: list[torch.Tensor]
    ended: torch.Tensor
    vision: dict[str, torch.Tensor] | None = None


class GeometricMixture(LogitsProcessor):
    """
    Makes the model that is sampled from the mixture `pi^(1 - c) ref^c`, renormalised at each token.

    The normaliser of whole completions is thereby approximated token by token, as IPO-MD and Nash-MD do in practice.

    Args:
        reference (`Callable`):
            The reference model. Keeps a cache of its own, so each token runs through it once.
        attention_mask (`torch.Tensor` of shape `(N, P)`):
            Of the prompts, padded on the left.
        coefficient (`torch.Tensor` of shape `(N, 1)`):
            Weight `c` of the reference for each row.
    """

    def __init__(self, reference: Callable, attention_mask: torch.Tensor, coefficient: torch.Tensor):
        self.reference, self.mask, self.coefficient = reference, attention_mask, coefficient
        self.cache, self.seen = DynamicCache(config=reference.config.get_text_config()), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self.seen :]
        self.mask = nn.functional.pad(self.mask, (0, input_ids.size(1) - self.mask.size(1)), value=1)
        self.seen = input_ids.size(1)
        logits = self.reference(
            input_ids=new,
            attention_mask=self.mask,
            position_ids=_positions(self.mask)[:, -new.size(1) :],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        policy, reference = scores.float().log_softmax(-1), logits.float().log_softmax(-1)
        return (1 - self.coefficient) * policy + self.coefficient * reference


class DrawToken(LogitsProcessor):
    """
    Draws each row's next token and leaves it as the only one.

    By inversion of the distribution function, which on a CPU costs a fraction of `torch.multinomial`: that draws a random
    number for each entry of the vocabulary.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulated = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        point = torch.rand_like(total) * total
        point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
        # The first entry above the point: never one of probability 0
        token = torch.searchsorted(cumulated, point, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _decode_on_cpu(model, input_ids, logits_processor=None, generation_config=None, **kwargs):
    """
    transformers' own loop with [`DrawToken`] in place of its draw.

    `generate` hands a loop that is not its own no `synced_gpus`, so [`sample`] does.
    """
    if generation_config.do_sample:
        generation_config.do_sample = False  # a copy of the caller's
        logits_processor.append(DrawToken())
    return type(model)._sample(
        model, input_ids, logits_processor=logits_processor, generation_config=generation_config, **kwargs
    )


def sample(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    config: GenerationConfig,
    num_generations: int,
    mixture: Callable[[torch.Tensor], LogitsProcessor] | None = None,
) -> torch.Tensor:
    """
    `num_generations` completions of each prompt.

    Each prompt runs through the model once: its cache is copied for the samples. Where the cache cannot be copied
    (recurrent layers, a static cache, beams), the prompt runs once per sample.

    The samples follow the model's distribution as `config` alone changes it: nothing is taken from the model's own
    `generation_config`, and what `config` leaves open changes nothing.

    A model that is sharded over processes runs in all of them until the last has its samples. With a mixture, each process
    then samples up to `max_new_tokens`, past its end-of-sequence tokens: one that stopped would no longer run the reference.
    What follows an end-of-sequence token is the caller's to cut off.

    Args:
        model (`nn.Module`):
            The model, unwrapped, in evaluation mode.
        prompt_ids (`torch.Tensor` of shape `(B, P)`):
            Prompts, padded on the left.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            1 at tokens.
        config ([`~transformers.GenerationConfig`]):
            How to sample.
        num_generations (`int`):
            Completions per prompt, `K`.
        mixture (`Callable`, *optional*):
            Makes a logits processor from the attention mask of all rows.

    Returns:
        `torch.Tensor` of shape `(K B, T)`, in blocks of `B`.
    """
    rows, width = prompt_ids.shape
    synced = _is_sharded(model)
    config = copy.deepcopy(config)
    if config.top_k is None:
        config.top_k = 0  # `generate` would take 50
    if synced and mixture is not None:
        config.eos_token_id = None
    ids, mask = (tensor.repeat_interleave(num_generations, dim=0) for tensor in (prompt_ids, prompt_mask))
    kwargs: dict[str, Any] = {}
    if mixture is not None:
        kwargs["logits_processor"] = LogitsProcessorList([mixture(mask)])
    if num_generations > 1 and width > 1 and _can_copy_cache(model, config):
        kwargs["past_key_values"] = _prefill(model, prompt_ids, prompt_mask, num_generations)
    if ids.device.type == "cpu" and config.do_sample and (config.num_beams or 1) == 1:
        kwargs["custom_generate"] = functools.partial(_decode_on_cpu, synced_gpus=synced)
    with without_defaults(model):
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced, **kwargs
        )
    completions = output[:, width:]
    return completions.view(rows, num_generations, -1).transpose(0, 1).flatten(0, 1)


def _is_sharded(model: nn.Module) -> bool:
    """Whether all processes must run the model together, each for as long as any does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    sharded = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return torch.distributed.get_world_size() > 1 and (sharded or is_deepspeed_zero3_enabled())


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _can_copy_cache(model: nn.Module, config: GenerationConfig) -> bool:
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


def _prefill(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, copies: int) -> DynamicCache:
    """The cache of all prompt tokens but the last, each prompt's copied."""
    cache = DynamicCache(config=model.config.get_text_config())
    model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=_positions(mask)[:, :-1],
        past_key_values=cache,
        use_cache=True,
        **last_logits(model),
    )
    cache.batch_repeat_interleave(copies)
    return cache


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
