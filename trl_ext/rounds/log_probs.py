"""Log-probabilities of given completions under a model: implicit rewards, and the columns of two-reference losses."""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl.data_utils import apply_chat_template
from trl.trainer.utils import add_fused_lm_head, pad

from trl_ext.logprobs import Head, sum_completions
from trl_ext.trainers.trl_seam import bind_forward, fused_forward, head_in_place, unbind_forward


def completion_log_probs(
    model: str | PreTrainedModel,
    rows: list[tuple],
    *,
    tokenizer=None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[float]:
    """
    Log-probability of each completion after its prompt, the end-of-sequence token included, summed over tokens, in nats.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model.
        rows (`list[tuple]`):
            (prompt, completion), both text or both messages.
        tokenizer (*optional*):
            Loaded from the model's name by default.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions at a time.
        max_length (`int`, *optional*):
            Tokens of prompt and completion that are kept, from the start.
    """
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.config._name_or_path)
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    unbind_forward(model)
    add_fused_lm_head(model)
    bind_forward(model)
    model.eval()
    device = next(model.parameters()).device
    encoded = [_encode(prompt, completion, tokenizer) for prompt, completion in rows]
    order = sorted(range(len(rows)), key=lambda index: -len(encoded[index][0]))
    sums = [0.0] * len(rows)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids = [torch.tensor(encoded[i][0][:max_length]) for i in part]
            masks = [(torch.arange(len(row)) >= encoded[i][1]).long() for i, row in zip(part, ids, strict=True)]
            batch = {
                "input_ids": pad(ids, padding_value=pad_id, padding_side="right").to(device),
                "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0).to(device),
                "completion_mask": pad(masks, padding_value=0).to(device),
            }
            with torch.no_grad(), head_in_place(Head("torch"), ()):
                outputs = fused_forward(model, batch, router_logits=False)
            for index, value in zip(
                part, sum_completions(outputs.log_probs, batch["completion_mask"]).tolist(), strict=True
            ):
                sums[index] = value
    finally:
        unbind_forward(model)
    return sums


def _encode(prompt, completion, tokenizer) -> tuple[list[int], int]:
    """Token ids, and where the completion begins: where prompt and whole part, as in TRL."""
    if isinstance(prompt, str):
        text = completion if completion.endswith(tokenizer.eos_token) else completion + tokenizer.eos_token
        first, whole = (tokenizer(each)["input_ids"] for each in (prompt, prompt + text))
    else:
        rendered = apply_chat_template({"prompt": prompt, "completion": completion}, tokenizer)
        first, whole = (
            tokenizer(each, add_special_tokens=False)["input_ids"]
            for each in (rendered["prompt"], rendered["prompt"] + rendered["completion"])
        )
    start = next(
        (i for i, (a, b) in enumerate(zip(first, whole, strict=False)) if a != b), min(len(first), len(whole))
    )
    return whole, start


def implicit_rewards(groups: Dataset, policy: str, reference: str, **options) -> Dataset:
    """Groups with `scores`: `log policy - log reference` of each completion, in nats (DICE's, without `beta`)."""
    rows = [(row["prompt"], completion) for row in groups for completion in row["completions"]]
    ratios = iter(
        a - b
        for a, b in zip(
            completion_log_probs(policy, rows, **options),
            completion_log_probs(reference, rows, **options),
            strict=True,
        )
    )
    scores = [[next(ratios) for _ in completions] for completions in groups["completions"]]
    there = ["scores"] if "scores" in groups.column_names else []
    return groups.remove_columns(there).add_column("scores", scores)
