"""
Completions of prompts, sampled with transformers or vLLM.

Work is cut into chunks of prompts. Each is drawn with a seed of its own and written to disk when it is done, so a run that
was killed goes on with the chunk it was in and ends with the same completions.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template

from trl_ext.data.cache import content_key, default_folder, model_key, processes, read_sealed, write_sealed
from trl_ext.data.checks import check_count
from trl_ext.data.generators import (
    Sampling,
    check_dtype,
    generation_config_of,
    stop_tokens,
    weights_key,
    with_transformers,
    with_vllm,
)
from trl_ext.data.pairing import pair_up
from trl_ext.data.paths import refuse_missing_path, refuse_unwritable_folder
from trl_ext.data.reasoning import completion_text, empty_trace_prompt
from trl_ext.data.texts import problem_of_text
from trl_ext.data.tokens import prompt_ids, require_chat_template, template_arguments, tokenizer_key


REASONS = ("stop", "length")


logger = get_logger(__name__)


def sample_completions(
    prompts: Dataset,
    model: str | nn.Module,
    num_generations: int = 4,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    use_vllm: bool = False,
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
    `num_generations` completions of each prompt, drawn from the policy's own distribution.

    Only `temperature` and `top_p` change it: penalties, `top_k` and other defaults of the model's `generation_config` are not
    applied, its end-of-sequence tokens are. Prompts are tokenized as training tokenizes them.

    Args:
        prompts ([`~datasets.Dataset`]):
            With a column `prompt`, plain or conversational; other columns are kept, `tools` and `chat_template_kwargs` reach
            the chat template.
        model (`str` or [`~transformers.PreTrainedModel`]):
            What is sampled from: hub name, folder or object (vLLM: a name or folder).
        num_generations (`int`, *optional*, defaults to `4`):
            Completions per prompt.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; loaded from the model's name by default.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM samples, which loads the model itself, and not transformers, with a cache and one prefill per prompt.
        thinking (`bool`, *optional*):
            `False` switches reasoning off through the template; `True` and `None` leave the prompt as the template has it.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of sampling; 0 takes the likeliest token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass that is sampled from.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Tokens that a completion has at most.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts at a time, and in each chunk.
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
    options = Sampling(num_generations, temperature, top_p, max_new_tokens, seed)
    check_count("batch_size", batch_size)
    check_dtype(dtype)
    check_prompts(prompts)
    refuse_missing_path(model, "model")
    if cache_dir is not None:
        refuse_unwritable_folder(cache_dir, "cache_dir")
    if not isinstance(use_vllm, bool):
        raise ValueError(f"`use_vllm={use_vllm!r}` must be True or False.")
    if use_vllm and not isinstance(model, str):
        raise ValueError("`use_vllm=True` loads the model itself: give its name or folder.")
    tokenizer = processing_class
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.config.name_or_path)
    state = processes()
    rows = list(prompts)
    ids = [
        prompt_ids(render_prompt(row, tokenizer, thinking), tokenizer, isinstance(row["prompt"], list)) for row in rows
    ]
    for index, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"The prompt of row {index} has no tokens: {rows[index]['prompt']!r}.")
    if use_vllm:
        identity = [weights_key(model), str(dtype)]
        stops = stop_tokens(generation_config_of(model), tokenizer)
    else:
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        model = model.to(state.device)
        identity, stops = model_key(model), stop_tokens(model.generation_config, tokenizer)
    folder = Path(cache_dir) if cache_dir is not None else default_folder() / "samples"
    folder = folder / content_key(
        identity, use_vllm, asdict(options), batch_size, stops, tokenizer_key(tokenizer), ids
    )
    chunks = range(0, len(ids), batch_size)
    # Shared out before looking what is done: another process may be ahead and have written some
    mine = [
        start
        for start in chunks[state.process_index :: state.num_processes]
        if not _kept(folder / f"{start}.json", len(ids[start : start + batch_size]), num_generations)
    ]
    if mine and use_vllm:
        generate = with_vllm(model, dtype, stops, options)
    elif mine:
        generate = with_transformers(model, tokenizer, stops, options)
    for start in tqdm(mine, desc="sampling", unit="batch", disable=not state.is_main_process or not mine):
        groups = generate(ids[start : start + batch_size], start)
        answers = [[_answer(tokens, tokenizer, stops) for tokens in group] for group in groups]
        write_sealed(folder / f"{start}.json", answers)
    state.wait_for_everyone()
    answers = [answer for start in chunks for answer in read_sealed(folder / f"{start}.json")]

    def as_completion(text: str, prompt: Any) -> Any:
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    return Dataset.from_list(
        [
            {
                **row,
                "completions": [as_completion(text, row["prompt"]) for text, _ in answer],
                "stop_reasons": [reason for _, reason in answer],
            }
            for row, answer in zip(rows, answers, strict=True)
        ]
    )


def check_prompts(prompts: Any) -> None:
    if not isinstance(prompts, Dataset) or "prompt" not in prompts.column_names or not len(prompts):
        columns = getattr(prompts, "column_names", type(prompts).__name__)
        raise ValueError(f"`prompts` must be a dataset with a column 'prompt' and at least one row; got {columns}.")
    for index, prompt in enumerate(prompts["prompt"]):
        problem = f"is {prompt!r}, which is empty" if prompt in ("", []) else problem_of_text(prompt)
        if problem is not None:
            raise ValueError(f"Row {index}: the prompt {problem}.")


def render_prompt(row: dict, tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> str:
    """The text of a row's prompt as the model sees it, but for what the tokenizer adds to plain text."""
    if isinstance(row["prompt"], list):
        require_chat_template(tokenizer)
    example, given = {"prompt": row["prompt"]}, template_arguments(row)
    if thinking is False:
        return empty_trace_prompt(example | given, tokenizer)
    options = given.get("chat_template_kwargs", {})
    return maybe_apply_chat_template(example, tokenizer, given.get("tools"), **options)["prompt"]


def _kept(path: Path, prompts: int, num_generations: int) -> bool:
    """Whether a chunk is on disk, whole. One that is damaged, or something else, is drawn again, with the same seed."""
    if not path.exists():
        return False
    try:
        groups = read_sealed(path)
        if not _are_answers(groups, prompts, num_generations):
            raise ValueError(f"{path} holds no completions of {prompts} prompts.")
    except ValueError as error:
        logger.warning(f"{error} Its completions are drawn again.")
        return False
    return True


def _are_answers(groups: Any, prompts: int, num_generations: int) -> bool:
    """Whether these are completions of so many prompts, each with why it ended."""
    if not isinstance(groups, list) or len(groups) != prompts:
        return False
    if not all(isinstance(group, list) and len(group) == num_generations for group in groups):
        return False
    answers = [answer for group in groups for answer in group]
    return all(
        isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) and each[1] in REASONS
        for each in answers
    )


def _answer(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> tuple[str, str]:
    """Text of a completion up to its end, and why it ended."""
    end = next((at for at, token in enumerate(ids) if token in stops), None)
    return completion_text(ids[:end], tokenizer), "length" if end is None else "stop"


def pair_traces(traced: Dataset, empty: Dataset) -> Dataset:
    """
    Data for `bias_variance` from two scored samplings of the same prompts.

    Args:
        traced ([`~datasets.Dataset`]):
            Groups (`prompt`, `completions`, `scores`) sampled as the template has it.
        empty ([`~datasets.Dataset`]):
            Groups of the same prompts, in the same order, sampled with reasoning switched off.

    Returns:
        One row per prompt: `chosen` and `rejected`, the best and the worst with a trace; `chosen_empty_trace` and
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
