"""
Completions of prompts, sampled with transformers or vLLM.

Work is cut into chunks of prompts. Each is drawn with a seed of its own and written to disk when it is done, so a run that
was killed goes on with the chunk it was in and ends with the same completions.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template
from trl.trainer.utils import hash_module

from trl_ext.data.cache import content_key, default_folder, processes, write_atomically
from trl_ext.data.pairing import pair_up
from trl_ext.data.reasoning import empty_trace_prompt
from trl_ext.generation import evaluating, sample


def sample_completions(
    prompts: Dataset,
    model: str | nn.Module,
    n: int = 4,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: str = "transformers",
    thinking: bool | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    dtype: Any = "auto",
) -> Dataset:
    """
    `n` completions of each prompt.

    Args:
        prompts ([`~datasets.Dataset`]):
            With a column `prompt`, plain or conversational; other columns are kept, `tools` and `chat_template_kwargs` reach
            the chat template.
        model (`str` or [`~transformers.PreTrainedModel`]):
            What is sampled from: hub name, folder or object (vLLM: a name or folder).
        n (`int`, *optional*, defaults to `4`):
            Completions a prompt.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Loaded from the model's name by default.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, with a cache and one prefill a prompt, or `"vllm"`.
        thinking (`bool`, *optional*):
            `False` switches reasoning off through the template; `True` and `None` leave the prompt as the template has it.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of sampling; 0 takes the likeliest token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that is sampled from.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Tokens a completion has at most.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts at a time, and in a chunk.
        seed (`int`, *optional*, defaults to `0`):
            The same seed gives the same completions, in however many sittings.
        cache_dir (`str` or `Path`, *optional*):
            Where chunks are kept; `$TRL_EXT_CACHE` or `~/.cache/trl_ext` by default.
        dtype (*optional*, defaults to `"auto"`):
            Of the weights, for a model that is loaded here.

    Returns:
        The dataset with `completions`, and `stop_reasons`: `"stop"` where a completion ended by itself, else `"length"`.

    Raises:
        `ValueError`: For prompts or options that cannot be used, before the work starts.
    """
    _check(prompts, n, backend, temperature, max_new_tokens, batch_size)
    state = processes()
    name = model if isinstance(model, str) else model.config._name_or_path
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    if backend == "vllm":
        if not isinstance(model, str):
            raise ValueError('`backend="vllm"` loads the model itself: give its name or folder.')
        identity, generate = name, _vllm(model, dtype, n, temperature, top_p, max_new_tokens)
    else:
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        model = model.to(state.device)
        identity = hash_module(model)
        generate = _transformers(model, tokenizer, n, temperature, top_p, max_new_tokens)

    rows = list(prompts)
    texts = [_render(row, tokenizer, thinking) for row in rows]
    for index, text in enumerate(texts):
        if not tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"The prompt of row {index} has no tokens: {rows[index]['prompt']!r}.")
    settings = [identity, backend, n, temperature, top_p, max_new_tokens, seed, batch_size, tokenizer.get_vocab()]
    folder = Path(cache_dir) if cache_dir is not None else default_folder() / "samples"
    folder = folder / content_key(settings, texts)
    chunks = range(0, len(texts), batch_size)
    # Shared out before looking what is done: another process may be ahead and have written some
    mine = [
        start
        for start in chunks[state.process_index :: state.num_processes]
        if not (folder / f"{start}.json").exists()
    ]
    for start in tqdm(mine, desc="sampling", unit="batch", disable=not state.is_main_process or not mine):
        answers = generate(texts[start : start + batch_size], int(content_key(seed, start), 16) % 2**31)
        write_atomically(folder / f"{start}.json", json.dumps(answers))
    state.wait_for_everyone()
    answers = [answer for start in chunks for answer in json.loads((folder / f"{start}.json").read_text())]

    def as_completion(text: str, prompt: Any) -> Any:
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    completions = [
        [as_completion(text, row["prompt"]) for text, _ in answer] for row, answer in zip(rows, answers, strict=True)
    ]
    return Dataset.from_list(
        [
            {**row, "completions": texts, "stop_reasons": [reason for _, reason in answer]}
            for row, texts, answer in zip(rows, completions, answers, strict=True)
        ]
    )


def _check(prompts, n, backend, temperature, max_new_tokens, batch_size) -> None:
    if not isinstance(prompts, Dataset) or "prompt" not in prompts.column_names or not len(prompts):
        columns = getattr(prompts, "column_names", type(prompts).__name__)
        raise ValueError(f"`prompts` must be a dataset with a column 'prompt' and at least one row; got {columns}.")
    if backend not in ("transformers", "vllm"):
        raise ValueError(f"`backend={backend!r}` is unknown; choose 'transformers' or 'vllm'.")
    for name, value, least in (("n", n, 1), ("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}={value!r}` must be a whole number, at least {least}.")
    if not temperature >= 0:
        raise ValueError(f"`temperature={temperature!r}` must be at least 0.")
    for index, prompt in enumerate(prompts["prompt"]):
        if not prompt or not isinstance(prompt, (str, list)):
            raise ValueError(f"Row {index}: the prompt is {prompt!r}; expected text or messages.")


def _render(row: dict, tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> str:
    example = {name: row[name] for name in ("prompt", "tools", "chat_template_kwargs") if row.get(name)}
    if thinking is False:
        return empty_trace_prompt(example, tokenizer)
    options, tools = example.pop("chat_template_kwargs", {}), example.pop("tools", None)
    return maybe_apply_chat_template(example, tokenizer, tools, **options)["prompt"]


Generate = Callable[[list[str], int], list[list[tuple[str, str]]]]


def _transformers(model, tokenizer, n, temperature, top_p, max_new_tokens) -> Generate:
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops = [tokenizer.eos_token_id, *stops]
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=pad_id,
        eos_token_id=stops,
        use_cache=True,
        **sampling,
    )

    def generate(texts: list[str], seed: int) -> list[list[tuple[str, str]]]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        inputs = inputs.to(next(model.parameters()).device)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), evaluating(model, None):
            torch.manual_seed(seed)
            output = sample(model, inputs["input_ids"], inputs["attention_mask"], config, n)
        answers: list[list[tuple[str, str]]] = [[] for _ in texts]
        for index, ids in enumerate(output.tolist()):
            end = next((at for at, token in enumerate(ids) if token in stops), None)
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            answers[index % len(texts)].append((text, "length" if end is None else "stop"))
        return answers

    return generate


def _vllm(model, dtype, n, temperature, top_p, max_new_tokens) -> Generate:
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ValueError('`backend="vllm"` needs vLLM: pip install vllm.') from error
    llm = LLM(model=model, dtype=dtype)

    def generate(texts: list[str], seed: int) -> list[list[tuple[str, str]]]:
        parameters = SamplingParams(n=n, temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed)
        outputs = llm.generate(texts, parameters, use_tqdm=False)
        return [[(each.text, each.finish_reason) for each in output.outputs] for output in outputs]

    return generate


def pair_traces(traced: Dataset, empty: Dataset) -> Dataset:
    """
    Data for `bias_variance` from two scored samplings of the same prompts.

    Args:
        traced ([`~datasets.Dataset`]):
            Groups (`prompt`, `completions`, `scores`) sampled as the template has it.
        empty ([`~datasets.Dataset`]):
            Groups of the same prompts, in the same order, sampled with reasoning switched off.

    Returns:
        One row a prompt: `chosen` and `rejected`, the best and the worst with a trace; `chosen_empty_trace` and
        `rejected_empty_trace`, those without. A pair whose completions tie is `None`; a prompt without either is left out.
    """
    if list(traced["prompt"]) != list(empty["prompt"]):
        raise ValueError("The two datasets hold different prompts, or the same in another order.")
    rows = []
    for with_trace, without in zip(traced, empty, strict=True):
        pair, other = _best_and_worst(with_trace), _best_and_worst(without)
        if pair or other:
            best, worst = pair or (None, None)
            best_empty, worst_empty = other or (None, None)
            rows.append(
                {
                    "prompt": with_trace["prompt"],
                    "chosen": best,
                    "rejected": worst,
                    "chosen_empty_trace": best_empty,
                    "rejected_empty_trace": worst_empty,
                }
            )
    if not rows:
        raise ValueError("All completions of each prompt have the same score: there is nothing to prefer.")
    return Dataset.from_list(rows)


def _best_and_worst(group: dict) -> tuple[Any, Any] | None:
    scores = torch.tensor([group["scores"]], dtype=torch.float64)
    pairs = pair_up(scores, torch.ones_like(scores, dtype=torch.bool))
    if not len(pairs.group):
        return None
    return group["completions"][int(pairs.chosen)], group["completions"][int(pairs.rejected)]
