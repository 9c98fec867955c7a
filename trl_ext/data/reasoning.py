"""
Pairs with and without reasoning traces, for `bias_variance`.

The empty-trace pair is a pair of completions sampled with reasoning switched off (`chosen_empty_trace`,
`rejected_empty_trace`). It is scored after the prompt as a model with reasoning switched off sees it: rendered with the
chat template's `enable_thinking=False` where the template knows it, else with an empty think block after the prompt. The
block belongs to the prompt: it is the same for both completions, so its log-probability cancels, and it is not scored.
"""

import json
import os
import re
from typing import Any

from datasets import Dataset, IterableDataset

from trl_ext.data.further import FURTHER


# What reasoning models with thinking switched off have after the prompt
EMPTY_TRACE = "<think>\n\n</think>\n\n"
_TRACE = re.compile(r"^.*?</think>\s*", flags=re.DOTALL)
_OPENED = re.compile(r"<think>\s*(</think>\s*)?$")

# Row flag, there while a dataset is prepared: whether the row has the traced pair
HAS_TRACES = "has_traces"


def strip_reasoning_traces(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Add `chosen_empty_trace` and `rejected_empty_trace`: the completions without what stands before `</think>`.

    An approximation of the paper, which samples the empty-trace pair anew with reasoning switched off and ranks it on
    its own: here it inherits answers that were written with a trace, and their order. Rows that hold no trace, or one
    that is not closed, get `None`: they train on the traced pair alone.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference dataset with `prompt`, `chosen` and `rejected`, plain or conversational.

    Returns:
        The dataset with the two columns.
    """

    def strip(example: dict) -> dict:
        answers = {side: _answer(example[side]) for side in ("chosen", "rejected")}
        if None in answers.values():
            answers = dict.fromkeys(answers)
        return {f"{side}_empty_trace": answer for side, answer in answers.items()}

    features = dataset.features
    if features is not None:
        features = features.copy()
        features.update({f"{side}_empty_trace": features[side] for side in ("chosen", "rejected")})
    return dataset.map(strip, features=features)


def _answer(completion: str | list[dict]) -> str | list[dict] | None:
    """What follows the reasoning trace, in the form of `completion`; `None` where there is no closed trace."""
    if isinstance(completion, str):
        return _TRACE.sub("", completion, count=1) if "</think>" in completion else None
    *before, last = completion
    content, reasoning = last.get("content"), last.get("reasoning_content")
    if isinstance(content, str) and "</think>" in content:
        content = _TRACE.sub("", content, count=1)
    elif not reasoning:
        return None
    answer = {**last, "content": content}
    if reasoning is not None:
        answer["reasoning_content"] = None
    return [*before, answer]


def check_pairs(example: dict, index: int, split: str) -> dict:
    """
    Mark a row that lacks the traced pair and fill its place, so that it can be tokenized; `data` empties it afterwards.

    Raises:
        `ValueError`: If a row has one completion of a pair without the other, or neither pair.
    """
    there = {}
    for kind, sides in (
        ("traced", ("chosen", "rejected")),
        ("empty-trace", ("chosen_empty_trace", "rejected_empty_trace")),
    ):
        missing = [side for side in sides if example[side] is None]
        if len(missing) == 1:
            raise ValueError(
                f"Row {index} of the {split} dataset has an incomplete {kind} pair: {missing[0]!r} is missing. Give both "
                "completions, or neither."
            )
        there[kind] = not missing
    if not any(there.values()):
        raise ValueError(
            f"Row {index} of the {split} dataset has neither a traced nor an empty-trace pair. Remove it."
        )
    for traced, empty in (("chosen", "chosen_empty_trace"), ("rejected", "rejected_empty_trace")):
        if there["traced"] and there["empty-trace"] and type(example[traced]) is not type(example[empty]):
            raise ValueError(
                f"Row {index} of the {split} dataset: {empty!r} is a {type(example[empty]).__name__}, {traced!r} a "
                f"{type(example[traced]).__name__}. Give both as text, or both as messages."
            )
    if not there["traced"]:
        example = {**example, "chosen": example["chosen_empty_trace"], "rejected": example["rejected_empty_trace"]}
    return {**example, HAS_TRACES: there["traced"]}


def tokenize_empty_trace(example: dict, tokenizer: Any) -> dict[str, list]:
    """
    Token ids of the empty-trace pair of a prepared row, if it has one, and an emptied traced pair where it has none of those.
    """
    row: dict[str, list] = {FURTHER: []}
    if example["chosen_empty_trace"] is not None:
        conversational = isinstance(example["prompt"], list)
        render = _render_messages if conversational else _render_text
        prompt, completions = render(example, tokenizer)

        def encode(text: str) -> list[int]:
            # A chat template writes its own special tokens
            return tokenizer(text, add_special_tokens=not conversational)["input_ids"]

        whole = {side: encode(prompt + text) for side, text in completions.items()}
        # Tokens may merge across the boundary: the completions start where the three part, as in TRL
        length = len(os.path.commonprefix([encode(prompt), *whole.values()]))
        ids = {f"{side}_ids": tokens[length:] for side, tokens in whole.items()}
        row[FURTHER].append({"prompt_ids": whole["chosen"][:length], **ids})
    if not example[HAS_TRACES]:
        row.update(chosen_ids=[], rejected_ids=[])
    return row


def _render_text(example: dict, tokenizer: Any) -> tuple[str, dict[str, str]]:
    completions = {side: example[f"{side}_empty_trace"] for side in ("chosen", "rejected")}
    eos = tokenizer.eos_token
    completions = {side: text if text.endswith(eos) else text + eos for side, text in completions.items()}
    return example["prompt"] + EMPTY_TRACE, completions


def answer_text(text: str, opened: bool = False) -> str:
    """
    What a completion says after its reasoning trace; all of it where there is none, nothing where the trace was cut.

    Args:
        text (`str`):
            The completion.
        opened (`bool`, *optional*, defaults to `False`):
            Whether the prompt had opened a trace, as [`trace_is_open`] says: then the completion holds no `<think>`.
    """
    if "</think>" in text:
        return _TRACE.sub("", text, count=1)
    return "" if opened or "<think>" in text else text


def trace_is_open(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a reasoning trace that its chat template opened."""
    return prompt.rstrip().endswith("<think>")


def completion_text(ids: list[int], tokenizer: Any) -> str:
    """A completion without special tokens, but with those that open and close a reasoning trace."""
    added = tokenizer.added_tokens_decoder.items()
    left_out = {number for number, token in added if token.special and "think" not in token.content}
    return tokenizer.decode([number for number in ids if number not in left_out])


def empty_trace_prompt(example: dict, tokenizer: Any) -> str:
    """The text of a prompt, plain or conversational, as a model with reasoning switched off sees it."""
    if isinstance(example["prompt"], str):
        return example["prompt"] + EMPTY_TRACE
    options, has_switch = _template_options(example, tokenizer)
    prompt = tokenizer.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True, **options)
    return prompt if has_switch else _before_trace(prompt) + EMPTY_TRACE


def _template_options(example: dict, tokenizer: Any) -> tuple[dict[str, Any], bool]:
    """Arguments of the chat template with reasoning switched off, and whether the template knows that switch."""
    tools = example.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options.update(example.get("chat_template_kwargs") or {})
    has_switch = "enable_thinking" in tokenizer.get_chat_template(tools=options["tools"])
    if has_switch:
        options["enable_thinking"] = False
    return options, has_switch


def _before_trace(prompt: str) -> str:
    """Templates of models that always reason open a trace in the generation prompt and leave it out of conversations."""
    opened = _OPENED.search(prompt)
    return prompt[: opened.start()] if opened else prompt


def _render_messages(example: dict, tokenizer: Any) -> tuple[str, dict[str, str]]:
    options, has_switch = _template_options(example, tokenizer)

    def render(messages: list[dict], **kwargs) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **kwargs)

    prompt = render(example["prompt"], add_generation_prompt=True)
    stem = _before_trace(prompt)
    completions = {}
    for side in ("chosen", "rejected"):
        messages = example[f"{side}_empty_trace"]
        whole = render(example["prompt"] + messages)
        head = next((head for head in (prompt, stem) if whole.startswith(head)), os.path.commonprefix([prompt, whole]))
        completions[side] = whole[len(head) :]
        content = messages[-1].get("content")
        if isinstance(content, str) and content.strip() not in completions[side]:
            raise ValueError(
                "The chat template renders the prompt differently when a completion follows, so that the completion "
                f"{content!r} cannot be told apart from it: the prompt alone ends in {prompt[-60:]!r}, with the "
                f"completion it is {whole[-120:]!r}. Use a template whose prompt is a prefix of the conversation."
            )
    return (prompt if has_switch else stem + EMPTY_TRACE), completions
