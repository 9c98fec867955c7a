"""What is looked at before training: rows that would train on nothing, or on something that nobody meant."""

import logging
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from trl_ext.reading import is_finite_number as is_finite_number


logger = logging.getLogger(__name__)

TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")
# Precomputed log-probs: columns of a dataset, and keys of TRL's batches
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise a `ValueError` for an argument that is no whole number, or a smaller one than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}={value!r}` must be a whole number, at least {least}.")


def require_columns(dataset: Dataset, names: list[str], hint: str = "") -> None:
    """Raise a `ValueError` that ends with `hint` for a dataset that lacks one of the columns."""
    missing = [name for name in names if name not in dataset.column_names]
    if missing:
        raise ValueError(f"The dataset lacks {missing}; its columns are {sorted(dataset.column_names)}.{hint}")


def is_empty(completion: Any) -> bool:
    """Whether a completion, text or messages, says nothing. `None` stands for a completion that is not there."""
    if isinstance(completion, str):
        return not completion.strip()
    if not isinstance(completion, list) or not completion:
        return completion is not None
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def check_tokenized(
    dataset: Dataset | IterableDataset, split: str, max_length: int | None, keep_start: bool
) -> Dataset | IterableDataset:
    """
    Rows that the user tokenized, without those of which truncation would leave no completion token.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            With `prompt_ids`, `chosen_ids` and `rejected_ids`.
        split (`str`):
            What the dataset is called in errors.
        max_length (`int`, *optional*):
            Tokens of prompt and completion that training keeps.
        keep_start (`bool`):
            Whether it keeps the first of them.

    Raises:
        `ValueError`: For a row that has an empty completion, and if no row is left.
    """

    def check(example: dict, row: int) -> None:
        for name in TOKENIZED:
            ids = example[name]
            if not isinstance(ids, list) and ids is not None:
                raise ValueError(
                    f"Row {row} of the {split} dataset has {ids!r:.60} in {name!r}; expected a list of token ids."
                )
            # Two passes of C over a row, which may have thousands
            if ids and (set(map(type, ids)) != {int} or min(ids) < 0):
                token = next(each for each in ids if type(each) is not int or each < 0)
                raise ValueError(
                    f"Row {row} of the {split} dataset has {token!r:.60} among {name!r}; expected token ids, whole numbers from 0."
                )
            if ids is None or (not ids and name != TOKENIZED[0]):
                raise ValueError(
                    f"Row {row} of the {split} dataset has no token in {name!r}: nothing of that completion could be scored, and "
                    "the pair would teach nothing. Remove the row."
                )

    def checked(example: dict, row: int) -> dict:
        check(example, row)
        return example

    if isinstance(dataset, IterableDataset):
        dataset = dataset.map(checked, with_indices=True)
    else:
        for row, example in enumerate(dataset.select_columns(list(TOKENIZED))):
            check(example, row)
    if max_length is None or not keep_start:
        return dataset
    kept = dataset.filter(lambda example: len(example["prompt_ids"]) < max_length)
    if isinstance(dataset, Dataset):
        say_what_was_dropped(len(dataset), len(kept), split, max_length)
    return kept


def refuse_unknown_tokens(dataset: Dataset | IterableDataset, split: str, model: Any) -> None:
    """
    Raise a `ValueError` for a token id that a model has no embedding for: on a GPU it would end in an assertion of the device.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized; a stream is not looked at, which would draw all of it.
        split (`str`):
            What the dataset is called in the error.
        model ([`~transformers.PreTrainedModel`]):
            What reads the tokens.
    """
    number = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if number is None or not isinstance(dataset, Dataset):
        return
    names = [name for name in TOKENIZED if name in dataset.column_names]
    for start, table in enumerate(dataset.select_columns(names).with_format("arrow").iter(batch_size=1000)):
        for name in names:
            largest = pc.max(pc.list_flatten(table.column(name))).as_py()
            if largest is not None and largest >= number:
                rows = table.column(name).to_pylist()
                row = 1000 * start + next(i for i, ids in enumerate(rows) if max(ids, default=0) >= number)
                raise ValueError(
                    f"Row {row} of the {split} dataset has the token id {largest} or one as large in {name!r}, and the model has {number} "
                    "embeddings. Take the tokenizer that belongs to the model, or, where tokens were added to it, give the model room for "
                    "them: model.resize_token_embeddings(len(tokenizer))."
                )


def say_what_was_dropped(before: int, after: int, split: str, max_length: int | None) -> None:
    """One warning for rows that were dropped since their prompts leave no room; a `ValueError` if no row is left."""
    if before and not after:
        raise ValueError(
            f"All {before} prompts of the {split} dataset have `max_length={max_length}` tokens or more, so nothing of a "
            "completion is left. Raise `max_length`."
        )
    if after < before:
        logger.warning(
            f"{before - after} of {before} rows of the {split} dataset were dropped: their prompts alone have "
            f"`max_length={max_length}` tokens or more. Raise `max_length` to keep them."
        )
