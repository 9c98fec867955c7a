"""What draws completions: transformers or vLLM, from the same token ids and both from the policy's own distribution."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from trl_ext.data.cache import content_key, content_seed
from trl_ext.data.checks import check_count
from trl_ext.generation import evaluating, sample_rows


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: arguments of [`~trl_ext.data.sample_completions`]; a `ValueError` for one that cannot be."""

    num_generations: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    def __post_init__(self):
        check_count("num_generations", self.num_generations)
        check_count("max_new_tokens", self.max_new_tokens)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature={self.temperature!r}` must be finite and at least 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p={self.top_p!r}` must lie in (0, 1].")


def check_dtype(dtype: Any) -> None:
    """Raise a `ValueError` for what names no dtype of weights: `"auto"`, a `torch.dtype` or its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not isinstance(found, torch.dtype):
        raise ValueError(f"`dtype={dtype!r}` is no dtype; expected 'auto' or a name such as 'bfloat16'.")


# From the ids of some prompts, and the number of the first among all, to the ids of the completions of each
Generate = Callable[[list[list[int]], int], list[list[list[int]]]]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIGS = ("config.json", "adapter_config.json")


def stop_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: the model's, from its generation config, and the tokenizer's."""
    stops = config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    own = tokenizer.eos_token_id
    return stops if own is None or own in stops else [own, *stops]


def generation_config_of(name: str) -> Any:
    """What says how completions of a model end, for a model that is not loaded here."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # no such file: the model's configuration says it
        return AutoConfig.from_pretrained(name).get_text_config()


def weights_key(name: str) -> str:
    """A hash of a model that is not loaded here: of the files in a folder, or of its commit on the hub."""
    folder = Path(name)
    if not folder.is_dir():  # the folder of a snapshot has the name of its commit
        return content_key(name, Path(snapshot_download(name, allow_patterns="config.json")).name)
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS or path.name in _CONFIGS)
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return content_key(digests)


def with_transformers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, stops: list[int], options: Sampling
) -> Generate:
    """Sampling with a cache and one prefill per prompt."""
    pad_id = next((each for each in (tokenizer.pad_token_id, *stops) if each is not None), 0)
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0} if options.temperature else {}
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        pad_token_id=pad_id,
        eos_token_id=stops or None,
        use_cache=True,
        **sampling,
    )

    def generate(ids: list[list[int]], start: int) -> list[list[list[int]]]:
        device = next(model.parameters()).device
        rows = [torch.tensor(row) for row in ids]
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), evaluating(model, None):
            torch.manual_seed(content_seed(options.seed, start))
            output = sample_rows(model, rows, config, options.num_generations, device)
        completions = [row.tolist() for row in output]
        return [completions[row :: len(ids)] for row in range(len(ids))]

    return generate


def with_vllm(model: str, dtype: Any, stops: list[int], options: Sampling) -> Generate:
    """Sampling with vLLM, which loads the model itself."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ValueError("`use_vllm=True` needs vLLM: pip install vllm.") from error
    # "vllm" stands for vLLM's own defaults: none of the model's penalties and limits
    llm = LLM(model=model, dtype=dtype, generation_config="vllm")

    def generate(ids: list[list[int]], start: int) -> list[list[list[int]]]:
        # One seed per prompt: with the same one, equal prompts would get equal completions
        parameters = [
            SamplingParams(
                n=options.num_generations,
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_new_tokens,
                stop_token_ids=stops,
                seed=content_seed(options.seed, start, row),
            )
            for row in range(len(ids))
        ]
        outputs = llm.generate([{"prompt_token_ids": row} for row in ids], parameters, use_tqdm=False)
        return [[list(each.token_ids) for each in output.outputs] for output in outputs]

    return generate
