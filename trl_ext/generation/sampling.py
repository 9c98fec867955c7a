"""Completions of prompts: of a padded batch, or of many prompts in parts that fit into memory."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import pad

from .decoding import decode, draw_on_cpu
from .modes import without_defaults
from .prefill import can_copy_cache, prefill


def sample(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    config: GenerationConfig,
    num_generations: int,
    mixture: Callable[[torch.Tensor], LogitsProcessor] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> torch.Tensor:
    """
    `num_generations` completions of each prompt.

    Each prompt runs through the model once: its cache is copied for the samples, and rows leave the batch when they have
    finished. Where the cache cannot be copied (recurrent layers, a static cache, beams), the prompt runs once per sample, and
    all rows run until the last has finished.

    The samples follow the model's distribution as `config` alone changes it: nothing is taken from the model's own
    `generation_config`, and what `config` leaves open changes nothing.

    A model that is sharded over processes runs in all of them until the last has its samples, and so does the reference of a
    mixture.

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
            Makes a logits processor from the attention mask of all rows: each prompt `K` times in a row.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer, for `stop_strings`.

    Returns:
        `torch.Tensor` of shape `(K B, T)`, in blocks of `B`. Completions that have finished are filled up with padding.

    Raises:
        `ValueError`: For `stop_strings` without a tokenizer, and for a mixture with beams or another search.
    """
    rows, width = prompt_ids.shape
    synced, copied = _is_sharded(model), can_copy_cache(model, config)
    config = copy.deepcopy(config)
    if config.top_k is None:
        config.top_k = 0  # `generate` would take 50
    plain = config.get_generation_mode() in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
    ids, mask = (tensor.repeat_interleave(num_generations, dim=0) for tensor in (prompt_ids, prompt_mask))
    kwargs: dict[str, Any] = {}
    if config.stop_strings:
        kwargs["stopping_criteria"] = StoppingCriteriaList([_stop_strings(config, processing_class)])
    if mixture is not None:
        if not plain:
            raise ValueError(
                f"A mixture with the reference is sampled token by token; the config asks for {config.get_generation_mode()}: "
                "leave out `num_beams` and what else asks for a search."
            )
        kwargs["logits_processor"] = LogitsProcessorList([mixture(mask)])
    if num_generations > 1 and copied:
        kwargs["past_key_values"] = prefill(model, prompt_ids, prompt_mask, num_generations)
    if plain and (copied or (synced and mixture is not None)):
        fill = next((token for token in (config.pad_token_id, *_end_tokens(config)) if token is not None), 0)
        kwargs["custom_generate"] = functools.partial(decode, synced_gpus=synced, leave=copied, fill=fill)
    elif ids.device.type == "cpu" and config.do_sample and (config.num_beams or 1) == 1:
        kwargs["custom_generate"] = functools.partial(draw_on_cpu, synced_gpus=synced)
    with without_defaults(model):
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced, **kwargs
        )
    completions = output[:, width:]
    return completions.view(rows, num_generations, -1).transpose(0, 1).flatten(0, 1)


def sample_rows(
    model: nn.Module,
    prompts: list[torch.Tensor],
    config: GenerationConfig,
    num_generations: int,
    device: torch.device,
    completions_at_once: int | None = None,
    mixture: Callable[[torch.Tensor], LogitsProcessor] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> list[torch.Tensor]:
    """
    `num_generations` completions of each prompt, so many at a time as fit into memory; otherwise as [`sample`] draws them.

    Prompts of similar length are sampled together, so that little of a part is padding. The processes of a model that is sharded
    all sample equally many parts: one with fewer prompts samples a prompt again and drops what comes.

    Args:
        model (`nn.Module`):
            The model, unwrapped, in evaluation mode.
        prompts (`list[torch.Tensor]`):
            The tokens of `B` prompts, at least one.
        config ([`~transformers.GenerationConfig`]):
            How to sample, with a `pad_token_id`.
        num_generations (`int`):
            Completions per prompt, `K`.
        device (`torch.device`):
            Where the model's inputs belong.
        completions_at_once (`int`, *optional*):
            The most completions that are sampled together, rounded down to whole prompts; those of one prompt are always. All by
            default.
        mixture (`Callable`, *optional*):
            Makes a logits processor from the attention mask of a part's rows: each prompt `K` times in a row.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer, for `stop_strings`.

    Returns:
        `list[torch.Tensor]` of the `K B` completions on the device, in blocks of `B`: completion `k` of prompt `b` is number
        `k B + b`. Each has its end-of-sequence token, if it has one, and nothing behind it.
    """
    count = len(prompts)
    at_once = count if completions_at_once is None else max(completions_at_once // num_generations, 1)
    found: dict[int, torch.Tensor] = {}
    for part in _parts([len(prompt) for prompt in prompts], at_once, device if _is_sharded(model) else None):
        rows = [prompts[place].to(device) for place in part]
        ids = pad(rows, padding_value=config.pad_token_id, padding_side="left")
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left")
        output = sample(model, ids, mask, config, num_generations, mixture, processing_class)
        numbers = [k * count + place for k in range(num_generations) for place in part]
        for number, row, length in zip(numbers, output, _lengths(output, config), strict=True):
            found.setdefault(number, row[:length])
    return [found[number] for number in range(num_generations * count)]


def _lengths(completions: torch.Tensor, config: GenerationConfig) -> list[int]:
    """Tokens of each completion: up to the first that ends it, or up to the padding behind a stop string."""
    width = completions.size(1)
    ends = torch.isin(completions, torch.tensor(_end_tokens(config), dtype=torch.long, device=completions.device))
    first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, width)
    if config.stop_strings:
        number = torch.arange(1, width + 1, device=completions.device)
        first = first.minimum((number * (completions != config.pad_token_id)).amax(dim=1))
    return first.tolist()


def _stop_strings(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None) -> StopStringCriteria:
    """What `config.stop_strings` ask for, taken out of it: `generate` hands a loop of ours no tokenizer."""
    if tokenizer is None:
        raise ValueError(f"`stop_strings={config.stop_strings!r}` are found in text: a tokenizer is needed.")
    strings, config.stop_strings = config.stop_strings, None
    return StopStringCriteria(tokenizer, strings)


def _end_tokens(config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _parts(lengths: list[int], at_once: int, shared_device: torch.device | None) -> list[list[int]]:
    """
    The places of prompts, at most so many in a part, the longest first; in their own order where there is one part.

    With a device, as many parts as the process has that needs the most; those that nothing is left for have a prompt again.
    """
    count = -(-len(lengths) // at_once)
    if shared_device is not None:
        most = torch.tensor(count, device=shared_device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        count = int(most)
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place] if count > 1 else place)
    return [part.tolist() or order[-1:] for part in torch.tensor(order).tensor_split(count)]


def _is_sharded(model: nn.Module) -> bool:
    """Whether all processes must run the model together, each for as long as any does."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    sharded = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return torch.distributed.get_world_size() > 1 and (sharded or is_deepspeed_zero3_enabled())
