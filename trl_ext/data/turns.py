"""
Which tokens of a completion are the assistant's, and in which of its turns.

A turn is one message of the assistant. It has the tokens that TRL would score if the conversation ended with it: what follows
the generation prompt, up to the end of the message, with its end-of-turn token and whatever the chat template writes behind
that. What users, systems and tools say has the turn -1, and so have the headers before an answer. A completion that is one
message, or plain text, is one turn: all of its tokens, as TRL scores them.

Turns are found by rendering the conversation up to each message and comparing token ids. A template that renders an earlier
message otherwise once another follows is asked for its own `{% generation %}` marks; without marks it is refused.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import common_prefix_length, prepare_multimodal_messages

from trl_ext.data.checks import TOKENIZED
from trl_ext.data.columns import columns_of
from trl_ext.data.tokens import template_arguments


TURNS = ("chosen_turns", "rejected_turns")
NOT_SCORED = -1

Ids = list[int]
Spans = list[tuple[int, int]]


def with_turns(
    tokenize: Callable[..., Dataset | IterableDataset],
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: Any,
    name: str,
) -> Dataset | IterableDataset:
    """
    TRL's preparation of pairs of messages, with the turn of each token beside their ids.

    Args:
        tokenize (`Callable`):
            TRL's preparation, called with dataset, processing class, config and name.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Conversational, with `prompt`, `chosen` and `rejected`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Renders messages.
        args ([`trl.DPOConfig`]):
            Configuration.
        name (`str`):
            What the dataset is called in errors.

    Returns:
        The dataset with token ids, and `chosen_turns` and `rejected_turns`: lists as long as `chosen_ids` and `rejected_ids`, the
        number of each token's turn from 0, -1 where none is scored.

    Raises:
        `ValueError`: For a row whose turns cannot be told, and for a dataset that has such columns already.
    """
    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        features = Features({**dataset.features, **{turns: [Value("int32")] for turns in TURNS}})
        options = {"num_proc": args.dataset_num_proc, "features": features}
    # In whole conversations first: TRL drops rows, and says only then where completions begin
    dataset = dataset.map(
        number_turns, with_indices=True, fn_kwargs={"processing_class": processing_class, "split": name}, **options
    )
    dataset = tokenize(dataset, processing_class, args, name)
    if isinstance(dataset, Dataset):
        options["features"] = dataset.features
    return dataset.map(_of_completions, **options)


def number_turns(
    example: dict[str, Any], index: int, processing_class: PreTrainedTokenizerBase | ProcessorMixin, split: str
) -> dict[str, Any]:
    """A row with the turns of its conversations, prompt included; an empty list stands for a completion that is one turn."""
    taken = [name for name in TURNS if example.get(name) is not None]
    if taken:
        raise ValueError(
            f"The {split} dataset has messages and the columns {taken}, which are made of them. Remove the columns, or give token "
            f"ids ({', '.join(TOKENIZED)}) in place of messages."
        )
    render = functools.partial(_rendered, processing_class, **_arguments(example))
    numbers = {}
    for side, name in zip(("chosen", "rejected"), TURNS, strict=True):
        where = f"Row {index} of the {split} dataset: {side!r}"
        messages = example[side]
        several = isinstance(messages, list) and len(messages) > 1
        numbers[name] = _numbers(example["prompt"], messages, render, processing_class, where) if several else []
    return {**example, **numbers}


def _numbers(prompt: list, completion: list, render: Callable, processing_class: Any, where: str) -> Ids:
    """The turn of each token of a conversation. The first may begin in the prompt, which is cut off afterwards."""
    count = sum(message["role"] == "assistant" for message in completion)
    if not count:
        roles = [message["role"] for message in completion]
        raise ValueError(f"{where} has no message of the assistant, so that nothing of it is scored; roles: {roles}.")
    messages = [*prompt, *completion]
    whole = render(messages)["input_ids"]
    spans = _by_boundaries(messages, len(prompt), whole, render, processing_class)
    if spans is None:
        spans = _by_marks(messages, len(prompt), whole, render, processing_class)
    if spans is None:
        raise ValueError(
            f"{where} has several messages, and the chat template renders an earlier one otherwise once another follows (it may drop "
            "reasoning, or tokens merge where messages meet), so that the tokens of turns cannot be told. Give the tokenizer a "
            "template that keeps what it wrote or marks it by {% generation %}: `tokenizer.chat_template = "
            "trl.chat_template_utils.get_training_chat_template(tokenizer)` for the families that TRL knows. Or split "
            f"conversations at their last turn, or give token ids with the columns {', '.join(TURNS)}."
        )
    turns = [NOT_SCORED] * len(whole)
    for number, (begin, end) in enumerate((begin, end) for begin, end in spans if begin < end):
        turns[begin:end] = [number] * (end - begin)
    return turns


def _by_boundaries(messages: list, first: int, whole: Ids, render: Callable, processing_class: Any) -> Spans | None:
    """Where the assistant's messages of the completion, which begins with the one at `first`, lie; `None` where it cannot be told."""
    ends_all = getattr(processing_class, "tokenizer", processing_class).eos_token_id
    spans = []
    for place in range(first, len(messages)):
        if messages[place]["role"] != "assistant":
            continue
        # The first and the last one need no look: they reach to where the completion begins and ends
        begin, end = 0, len(whole)
        if place > first:
            before = render(messages[:place])["input_ids"]
            opened = render(messages[:place], add_generation_prompt=True)["input_ids"]
            begin = common_prefix_length(opened, whole)
            if begin < common_prefix_length(before, opened):
                return None
        if place + 1 < len(messages):
            closed = render(messages[: place + 1])["input_ids"]
            end = common_prefix_length(closed, whole)
            # Some templates close every conversation with the end of sequence
            if any(token != ends_all for token in closed[end:]):
                return None
        spans.append((begin, end))
    return spans


def _by_marks(messages: list, first: int, whole: Ids, render: Callable, processing_class: Any) -> Spans | None:
    """The same by the template's own marks; `None` where it has none, or others than one for each message."""
    template = render.keywords.get("chat_template") or processing_class.chat_template
    if not has_generation_markers(template):
        return None
    mask = render(messages, return_assistant_tokens_mask=True)["assistant_masks"]
    marked, place = [], 0
    for is_marked, tokens in groupby(mask):
        begin, place = place, place + len(list(tokens))
        if is_marked:
            marked.append((begin, place))
    speakers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marked) != len(speakers):
        return None
    return [
        (begin if speaker > first else 0, end if speaker + 1 < len(messages) else len(whole))
        for speaker, (begin, end) in zip(speakers, marked, strict=True)
        if speaker >= first
    ]


def _arguments(example: dict[str, Any]) -> dict[str, Any]:
    """What TRL gives the chat template for a row."""
    given = template_arguments(example)
    return {"tools": given.get("tools"), **given.get("chat_template_kwargs", {})}


def _rendered(processing_class: Any, messages: list, **arguments: Any) -> dict[str, Ids]:
    """A conversation as token ids, as TRL renders it."""
    batched = isinstance(processing_class, ProcessorMixin)
    if batched:
        messages = prepare_multimodal_messages(messages)
    given = processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
    return {name: value[0] if batched else value for name, value in given.items()}


def _of_completions(example: dict[str, Any]) -> dict[str, Any]:
    start = len(example["prompt_ids"])
    for name, ids in zip(TURNS, TOKENIZED[1:], strict=True):
        example[name] = example[name][start:] if example[name] else [0] * len(example[ids])
    return example


def check_turns(example: dict[str, Any], row: int, split: str) -> None:
    """Raise a `ValueError` for turns, given with token ids, that are none."""
    for name, ids in zip(TURNS, TOKENIZED[1:], strict=True):
        turns, where = example.get(name), f"Row {row} of the {split} dataset"
        if not isinstance(turns, Sequence) or len(turns) != len(example[ids]):
            found = "no list" if not isinstance(turns, Sequence) else f"{len(turns)} numbers"
            raise ValueError(
                f"{where} has {found} in {name!r} and {len(example[ids])} tokens in {ids!r}; give one for each."
            )
        scored = [turn for turn in turns if turn != NOT_SCORED]
        numbered = all(isinstance(turn, int) and not isinstance(turn, bool) for turn in turns) and all(
            turn - before in (0, 1) for before, turn in zip([0, *scored], scored, strict=False)
        )
        if not scored or scored[0] != 0 or not numbered:
            raise ValueError(
                f"{where} has {list(turns)!r:.80} in {name!r}; expected whole numbers: the assistant's turns 0, 1, 2, ... in their order, none "
                "left out, and -1 at tokens that are not scored. At least one token must be scored."
            )


def checked_turns(dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
    """The dataset, once the turns that its user gave with token ids are found to be such; a stream as it is read."""
    if isinstance(dataset, Dataset):
        names = [name for name in (*TOKENIZED[1:], *TURNS) if name in dataset.column_names]
        for row, example in enumerate(dataset.select_columns(names)):
            check_turns(example, row, split)
        return dataset

    def checked(example: dict, row: int) -> dict:
        check_turns(example, row, split)
        return example

    return dataset.map(checked, with_indices=True)


def one_message_beside_images(dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
    """The dataset, once it is known that no row of one with images has a completion of several messages; a stream as it is read."""
    if not {"image", "images"} & set(columns_of(dataset, split)):
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(_refuse_messages, with_indices=True, fn_kwargs={"split": split})
    for row, example in enumerate(dataset.select_columns(["chosen", "rejected"])):
        _refuse_messages(example, row, split)
    return dataset


def _refuse_messages(example: dict, row: int, split: str) -> dict:
    for side in ("chosen", "rejected"):
        if isinstance(example[side], list) and len(example[side]) > 1:
            raise ValueError(
                f"Row {row} of the {split} dataset: {side!r} has several messages beside images, and a loss in use reads the "
                "assistant's turns. Completions with images are tokenized while training, where turns cannot be told apart. Split the "
                "conversation at its last turn, remove the images, or choose another loss."
            )
    return example


def range_of_turns(dataset: Dataset) -> tuple[int, int]:
    """The lowest and the highest turn of a dataset: -1 first where a token is not scored, 0 last where all have one turn."""
    table = dataset.select_columns(list(TURNS)).with_format("arrow")[:]
    ends = [pc.min_max(pc.list_flatten(table[name])).as_py() for name in TURNS]
    return min(end["min"] or 0 for end in ends), max(end["max"] or 0 for end in ends)
