"""Whether prompts and completions are text or messages, looked at row by row before a model is loaded."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from trl_ext.data.checks import TOKENIZED, is_empty
from trl_ext.reading import read_json


logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
# What rows give the chat template, and what it is given of them in any case
OF_TEMPLATE = ("tools", "chat_template_kwargs")
TAKEN = ("conversation", "tools", "tokenize", "return_dict", "add_generation_prompt", "continue_final_message")


def checked_texts(
    dataset: Dataset | IterableDataset, split: str, may_lack_pair: bool = False
) -> Dataset | IterableDataset:
    """
    The dataset, once its prompts and completions have been read and found to be text or messages.

    How many completions are empty is said once. A stream is checked as it is read: its first row now, each other row when it comes.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs, or rows of token ids, which pass.
        split (`str`):
            What the dataset is called in errors.
        may_lack_pair (`bool`, *optional*, defaults to `False`):
            Whether `chosen` and `rejected` may be `None`, as beside a pair with an empty trace, which is looked at elsewhere.

    Raises:
        `ValueError`: For a column that is absent, and for a value that is missing, neither text nor messages, or of another kind than
            what stands beside it in its row. Names the row.
    """
    first = None if isinstance(dataset, Dataset) else next(iter(dataset))
    available = list(first) if first is not None else dataset.column_names
    if set(TOKENIZED) <= set(available):
        return dataset
    missing = [name for name in SIDES if name not in available]
    if missing:
        raise ValueError(
            f"The {split} dataset lacks {missing}; its columns are {sorted(available)}. Training reads `prompt`, `chosen` and `rejected`, or "
            "groups: `prompt`, `completions` and `scores`."
        )

    def check(example: dict, row: int) -> dict:
        check_pair(example, f"Row {row} of the {split} dataset", may_lack_pair)
        return example

    if first is not None:
        check(first, 0)
        return dataset.map(check, with_indices=True)
    names = [name for name in ("prompt", *SIDES, *OF_TEMPLATE) if name in available]
    empty = []
    for row, example in enumerate(readable(dataset.select_columns(names), split)):
        check(example, row)
        if not may_lack_pair and any(is_empty(example[side]) for side in SIDES):
            empty.append(row)
    if empty:
        logger.warning(
            f"{len(empty)} of {len(dataset)} pairs of the {split} dataset have an empty completion, the first in row {empty[0]}. "
            "They train the model on ending its answer at once. If that is not meant, filter them out."
        )
    return dataset


def readable(rows: Iterable, split: str) -> Iterable:
    """The rows; text of which the bytes are not UTF-8 is a `ValueError` that says where it stands."""
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The {split} dataset holds text that is not UTF-8: {error}. Convert the file that it comes from."
        ) from error


def problem_of_text(value: Any) -> str | None:
    """What is wrong with a prompt or a completion; `None` for text and for a list of messages."""
    if isinstance(value, str):
        return None
    if value is None:
        return "has no value; expected text, or a list of messages"
    if not isinstance(value, (list, tuple)):
        return f"is {value!r:.80}; expected text, or a list of messages with 'role' and 'content'"
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"has the message {message!r:.80}; expected a dict with 'role' and 'content'"
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)) and not (content is None and message.get("tool_calls")):
            return f"has the message {message!r:.80}, whose 'content' is {content!r:.40}; expected text"
    return None


def check_pair(example: Mapping[str, Any], where: str, may_lack_pair: bool = False) -> None:
    """Raise a `ValueError` that begins with `where` for a row that is no pair of texts or messages."""
    given = {name: example[name] for name in ("prompt", *SIDES) if name in example}
    if may_lack_pair:
        given = {name: value for name, value in given.items() if value is not None or name == "prompt"}
    for name, value in given.items():
        problem = problem_of_text(value)
        if problem is not None:
            raise ValueError(f"{where}: {name!r} {problem}.")
        if value == []:
            raise ValueError(f"{where}: {name!r} is a list without a message. Remove the row, or give messages.")
    kinds = {name: "text" if isinstance(value, str) else "messages" for name, value in given.items()}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{name!r} is {kind}" for name, kind in kinds.items())
        raise ValueError(f"{where}: {shown}. Give all as text, or all as messages.")
    _check_template_arguments(example, where)


def _check_template_arguments(example: Mapping[str, Any], where: str) -> None:
    tools, options = (example.get(name) for name in OF_TEMPLATE)
    if isinstance(tools, str) and tools:
        try:
            tools = read_json(tools)
        except ValueError as error:
            raise ValueError(f"{where}: 'tools' is no JSON ({error}): {tools!r:.80}.") from error
    if tools and not isinstance(tools, (list, tuple)):
        raise ValueError(f"{where}: 'tools' is {tools!r:.80}; expected a list of tools, or one as JSON.")
    if options and not isinstance(options, Mapping):
        raise ValueError(f"{where}: 'chat_template_kwargs' is {options!r:.80}; expected a dict.")
    taken = [name for name in TAKEN if name in (options or ())]
    if taken:
        raise ValueError(f"{where}: 'chat_template_kwargs' may not set {taken}: training does.")
