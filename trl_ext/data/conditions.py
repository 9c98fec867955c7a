"""
Rows of supervised fine-tuning that belong to classes: `condition` names the class of a row, `weight` says what it counts.

The name of the class, the tag, stands before what the model answers to: a chat template writes it, or it is put into the text.
"""

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from trl_ext.data.columns import WEIGHT, checked, columns_of


CONDITION = "condition"
PLACES = ("template", "user")


def class_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Which of `condition` and `weight` the training data has."""
    available = columns_of(dataset, "train")
    return [name for name in (CONDITION, WEIGHT) if name in available]


def with_classes(
    dataset: Dataset | IterableDataset, columns: list[str], split: str, place: str, text_field: str
) -> Dataset | IterableDataset:
    """
    The dataset with checked weights, and with the tag of each row where the model reads it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As [`trl.SFTTrainer`] takes it; a stream is checked as it is read.
        columns (`list[str]`):
            What [`class_columns`] found in the training data.
        split (`str`):
            What the dataset is called in errors.
        place (`str`):
            Where the tag of a conversation goes: `"template"`, to the chat template as the variable `condition`; `"user"`, before
            the text of each message of the user. Of plain text it always goes before the prompt.
        text_field (`str`):
            Column that holds the text of language modeling data.

    Raises:
        `ValueError`: For a column that one of training and evaluation data has alone, weights that are negative, missing, no
            finite numbers, or all 0, a tag that is missing or no text, and rows that have no place for it.
    """
    available = columns_of(dataset, split)
    tokenized = "input_ids" in available
    if tokenized and CONDITION in available:
        raise ValueError(
            f"The {split} dataset is tokenized and has a column {CONDITION!r}: a tag cannot be put into tokens. Tokenize texts that "
            "hold it and remove the column, or give the texts."
        )
    for name in (CONDITION, WEIGHT):
        if (name in columns) != (name in available) and not (tokenized and name == CONDITION):
            has, lacks = ("train", split) if name in columns else (split, "train")
            raise ValueError(
                f"The {has} dataset has the column {name!r}, and the {lacks} dataset has not. Give both one, for evaluation the "
                f"class that is used later and the weight 1, or none."
            )
    if WEIGHT in available:
        dataset = checked(dataset, [WEIGHT], {}, split)
    if CONDITION not in available:
        return dataset
    if {"image", "images"} & {*available}:
        raise ValueError(f"The column {CONDITION!r} is read of text, and the {split} dataset has images. Remove one.")
    drop = [name for name in (CONDITION, "conversations", text_field) if name in available]
    if "prompt" in available:
        drop = [CONDITION]
    return dataset.map(
        _tagged, with_indices=True, remove_columns=drop, fn_kwargs={"split": split, "place": place, "text": text_field}
    )


def _tagged(row: dict[str, Any], index: int, split: str, place: str, text: str) -> dict[str, Any]:
    """A row with its tag; text of language modeling becomes the completion of the tag, which then is not learnt itself."""
    tag = row[CONDITION]
    if not isinstance(tag, str) or not tag.strip():
        raise ValueError(
            f"The column {CONDITION!r} of the {split} dataset holds {tag!r} in row {index}; expected the name of a class as text."
        )
    row = maybe_convert_to_chatml({name: value for name, value in row.items() if name != CONDITION})
    if is_conversational(row) and place == "template":
        return {**row, "chat_template_kwargs": {**(row.get("chat_template_kwargs") or {}), CONDITION: tag}}
    if is_conversational(row):
        return {**row, **_in_messages(row, tag, f"row {index} of the {split} dataset")}
    if place != "template":
        raise ValueError(
            f"`condition_in={place!r}` is about conversations, and row {index} of the {split} dataset is plain text, whose tag goes "
            "before the prompt. Leave it out."
        )
    if "prompt" in row:
        return {**row, "prompt": _joined(tag, row["prompt"])}
    rest = {name: value for name, value in row.items() if name != text}
    return {**rest, "prompt": tag, "completion": _joined(tag, row[text])[len(tag) :]}


def _joined(tag: str, text: str) -> str:
    """One space between tag and text, but where there is space already."""
    return tag + ("" if tag[-1].isspace() or text[:1].isspace() else " ") + text


def _in_messages(row: dict[str, Any], tag: str, where: str) -> dict[str, Any]:
    parts = {name: row[name] for name in ("messages", "prompt", "completion") if isinstance(row.get(name), list)}
    asked = [message for messages in parts.values() for message in messages if message["role"] == "user"]
    if not asked or not all(isinstance(message["content"], str) for message in asked):
        raise ValueError(
            f"The tag of {where} has no place: `condition_in='user'` needs a user's message of plain text."
        )
    return {
        name: [
            {**message, "content": _joined(tag, message["content"])} if message["role"] == "user" else message
            for message in messages
        ]
        for name, messages in parts.items()
    }


def require_reading_template(
    row: dict[str, Any], processing_class: PreTrainedTokenizerBase | ProcessorMixin, chat_template: str | None
) -> None:
    """Raise a `ValueError` where the chat template writes the same whatever the tag of a conversation is."""
    row = maybe_convert_to_chatml(dict(row))
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    given = row["chat_template_kwargs"]
    first, second = (
        processing_class.apply_chat_template(
            messages, tokenize=False, chat_template=chat_template, **{**given, CONDITION: tag}
        )
        for tag in (given[CONDITION], f"not {given[CONDITION]}")
    )
    if first == second:
        raise ValueError(
            f"The chat template does not read the variable {CONDITION!r}, so the tags of the column {CONDITION!r} would be lost. Give "
            "a template that writes it, as `{{ condition }} User: ...`, by `chat_template_path` or `tokenizer.chat_template`; or set "
            "`condition_in='user'`, which puts it before the text of each message of the user."
        )
