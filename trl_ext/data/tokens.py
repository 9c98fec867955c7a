"""
Token ids of texts outside of training: what is sampled from, and what a reward model reads.

They are the ids that TRL's trainers see. Plain text gets the tokenizer's special tokens, and a completion ends with the
end-of-sequence token; a chat template writes its own special tokens, and nothing is added to it.
"""

import json
import os
from typing import TYPE_CHECKING, Any

from trl_ext.data.keys import content_key


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Text = Any  # a string, or a list of messages


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that fills rows up: the tokenizer's padding token, else its end-of-sequence token, as in TRL."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def require_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a `ValueError` if the tokenizer cannot render conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The texts are conversations, and the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template to render them "
            "with. Give the tokenizer of a chat model, or set `tokenizer.chat_template`."
        )


def prompt_ids(text: str, tokenizer: "PreTrainedTokenizerBase", conversational: bool) -> list[int]:
    """
    Token ids that a completion is sampled after.

    Args:
        text (`str`):
            The prompt: plain text, or a conversation as the chat template rendered it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model that is sampled from.
        conversational (`bool`):
            Whether a chat template wrote the text, special tokens included.

    Returns:
        `list[int]`: the ids. What a tokenizer adds at the end, such as the end-of-sequence token, is left out: the
            completion begins there.
    """
    encoded = tokenizer(text, add_special_tokens=not conversational, return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    if not conversational:
        while len(ids) > 1 and added[len(ids) - 1]:
            ids = ids[:-1]
    return ids


def reward_ids(
    prompt: Text,
    completion: Text,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    tools: list | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Token ids that a reward model reads, as `RewardTrainer` trained it.

    Args:
        prompt (`str` or `list[dict]`):
            Text, or messages.
        completion (`str` or `list[dict]`):
            Of the same kind.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The reward model's own.
        max_length (`int`, *optional*):
            Tokens that are kept. A longer text loses its beginning, but not a first token that is the tokenizer's BOS or CLS.
        tools (`list`, *optional*):
            Of the conversation, for the chat template.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.

    Returns:
        `list[int]`: the ids.

    Raises:
        `ValueError`: For messages where the tokenizer has no chat template.
    """
    if isinstance(completion, str):
        eos = tokenizer.eos_token or ""
        ids = tokenizer(prompt + (completion if completion.endswith(eos) else completion + eos))["input_ids"]
    else:
        require_chat_template(tokenizer)
        ids = tokenizer.apply_chat_template(
            [*prompt, *completion],
            tools=tools or None,
            tokenize=True,
            return_dict=True,
            **(chat_template_kwargs or {}),
        )["input_ids"]
    if max_length is None or len(ids) <= max_length:
        return ids
    first = ids[:1] if ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []
    return first + ids[len(ids) - max_length + len(first) :]


def pair_lengths(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """
    Tokens of a preference pair as training counts them.

    Args:
        row (`dict[str, Any]`):
            `chosen` and `rejected`, and `prompt` where there is one; text or messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's.

    Returns:
        `dict[str, int]`: of `prompt`, `chosen` and `rejected`. A completion begins where it and the prompt part.
    """
    given, prompt = template_arguments(row), row.get("prompt")
    start = ("" if isinstance(row["chosen"], str) else []) if prompt is None else prompt
    whole = {side: reward_ids(start, row[side], tokenizer, **given) for side in ("chosen", "rejected")}
    if not start:
        return {"prompt": 0} | {side: len(ids) for side, ids in whole.items()}
    if isinstance(start, str):
        first = tokenizer(start)["input_ids"]
    else:
        arguments = {"tools": given.get("tools"), **given.get("chat_template_kwargs", {})}
        first = tokenizer.apply_chat_template(start, add_generation_prompt=True, return_dict=True, **arguments)[
            "input_ids"
        ]
    length = min(len(os.path.commonprefix([first, ids])) for ids in whole.values())
    return {"prompt": length} | {side: len(ids) - length for side, ids in whole.items()}


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs` of a row, as far as it has them; tools may be written as JSON."""
    given = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
    if isinstance(given.get("tools"), str):
        given["tools"] = json.loads(given["tools"])
    return given


def tokenizer_key(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of all that decides which ids a text becomes: vocabulary, rules, special tokens, chat template."""
    rules: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # of its last call
            rules.pop(state)
    return content_key(rules, tokenizer.special_tokens_map, tokenizer.chat_template)
