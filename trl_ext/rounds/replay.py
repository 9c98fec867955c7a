"""Older pairs among the new ones."""

from collections.abc import Iterable

from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets
from trl.data_utils import extract_prompt

from trl_ext.data.columns import list_lengths
from trl_ext.rounds.checks import load_rows


logger = get_logger(__name__)

TEXTS = ("prompt", "chosen", "rejected")
# What the chat template reads beside the messages
TEMPLATE = ("tools", "chat_template_kwargs")


def load_replay(name: str, prompts: Dataset, read: Iterable[str]) -> Dataset:
    """
    Data to replay, found fit to stand among new pairs.

    Args:
        name (`str`):
            Hub name, folder or file.
        prompts ([`~datasets.Dataset`]):
            The prompts of the new pairs, whose form the data must have.
        read (`Iterable[str]`):
            Columns of the new pairs that the losses of this run read.

    Returns:
        The data, with the columns that new pairs have.

    Raises:
        `ValueError`: For data that lack a column which is read: without it the loss would be another one. For lists of scores,
            and for data of another form than the prompts.
    """
    data = load_rows(name, "replay")
    if "prompt" not in data.column_names and {"chosen", "rejected"} <= set(data.column_names):
        data = data.map(extract_prompt, desc="Splitting the prompt off the data to replay")
    template = [column for column in TEMPLATE if column in prompts.column_names]
    missing = [column for column in (*TEXTS, *template, *read) if column not in data.column_names]
    if missing:
        raise ValueError(
            f"`replay={name!r}` lacks the columns {missing}, which the new pairs have and this run reads; its columns are "
            f"{sorted(data.column_names)}. Add them (scores: `trl_ext.data.score_preferences`), or choose a loss that does "
            "not read them."
        )
    alone = [column for column in TEMPLATE if column in data.column_names and column not in template]
    if alone:
        raise ValueError(
            f"`replay={name!r}` has the columns {alone}, which the chat template reads, and the prompts have not. Remove them, "
            "or add them to the prompts."
        )
    lists = list_lengths(data, read)
    if lists:
        raise ValueError(
            f"`replay={name!r}` has lists of scores in {list(lists)}, and rounds keep one score per completion. Take the mean of each."
        )
    if isinstance(data[0]["prompt"], str) != isinstance(prompts[0]["prompt"], str):
        raise ValueError(f"`replay={name!r}` and the prompts must both be text, or both be messages.")
    if "weight" in data.column_names:
        logger.warning(f"The column 'weight' of `replay={name!r}` is not used: new pairs have none.")
    return data.select_columns([*TEXTS, *template, *read])


def mix_replay(pairs: Dataset, replay: Dataset, share: float, seed: int) -> Dataset:
    """
    New pairs and older ones, shuffled.

    Args:
        pairs ([`~datasets.Dataset`]):
            The new pairs. Those of their columns that `replay` does not have are left out.
        replay ([`~datasets.Dataset`]):
            From [`load_replay`].
        share (`float`):
            Share of the result that comes from `replay`, in `[0, 1)`, drawn without repetition.
        seed (`int`):
            Of the draw.

    Raises:
        `ValueError`: If `replay` holds too few pairs.
    """
    count = round(len(pairs) * share / (1 - share))
    if count > len(replay):
        raise ValueError(
            f"`replay_share={share}` of {len(pairs)} new pairs needs {count} pairs to replay, and there are {len(replay)}. Give "
            "more, or lower the share."
        )
    new = pairs.select_columns(replay.column_names)
    old = replay.shuffle(seed=seed).select(range(count))
    return concatenate_datasets([new, old.cast(new.features)]).shuffle(seed=seed)
