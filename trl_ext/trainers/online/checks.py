"""What can be said about an online run before it begins, and about rewards before they are learnt from."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from trl_ext.data.columns import PAIRS, TEXT_COLUMNS, WEIGHT, checked
from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.tokens import require_chat_template


SCORE_COLUMNS = PAIRS[0]
# What a run itself gives the losses, for the completions that it has sampled
OWN_COLUMNS = (*SCORE_COLUMNS, *TEXT_COLUMNS, "preference_prob")


def check_losses(losses: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a loss that cannot be had online."""
    for name, loss in losses.items():
        if getattr(loss, "alpha", None) == "auto":
            raise ValueError(
                f"The loss {name!r} has `alpha='auto'`, which is measured on a dataset of pairs: offline training alone has one. "
                'Give it a number, such as loss_kwargs={"alpha": 0.5}.'
            )
        unknown = [column for column in loss.required_columns if _of_completions(column)]
        if unknown:
            raise ValueError(
                f"The loss {name!r} reads {unknown}, one value for each completion, which cannot be known before the "
                "completions are sampled. Train it offline: `trl_ext.DPOTrainer`, or `trl-ext iterate` for several rounds."
            )


def _of_completions(column: str) -> bool:
    return column not in OWN_COLUMNS and ("chosen" in column or "rejected" in column)


def check_reference(losses: Mapping[str, Any], args: Any) -> None:
    """Raise a `ValueError` for options that need the reference model where no loss reads one."""
    if any("ref_logps" in loss.reads for loss in losses.values()):
        return
    for option in ("mixture_coef", "sync_ref_model"):
        if getattr(args, option, None):
            raise ValueError(
                f"`{option}={getattr(args, option)!r}` needs a reference model, and a run of {list(losses)} has none: none of "
                "these losses reads it. Leave the option out, or use a loss with a reference."
            )


def reads_win_rates(loss: Any) -> bool:
    """Whether a loss takes scores as win rates: it refuses a score above 1 where a lower one is fine."""

    def refuses(score: float) -> bool:
        names = (*SCORE_COLUMNS, *loss.required_columns, *loss.optional_columns)
        columns = dict.fromkeys(names, torch.tensor([0.5]))
        bad = loss.check_columns({**columns, "score_chosen": torch.tensor([score])})
        return bad is not None and bool(bad.any())

    return refuses(1.5) and not refuses(0.75)


def check_arguments(
    model: Any,
    ref_model: Any,
    reward_funcs: Any,
    tokenizers: Any,
    judge: Any,
    processing_class: Any,
    compute_metrics: Any,
    args: Any,
) -> list:
    """The reward functions as a list; a `ValueError` for arguments that exclude each other or cannot be used."""
    if (reward_funcs is None or reward_funcs == []) == (judge is None):
        given = "neither" if judge is None else "both"
        raise ValueError(
            f"Completions are judged by `reward_funcs` or by a `judge`; got {given}. Give one of the two."
        )
    if judge is not None and not callable(judge):
        raise ValueError(f"`judge={judge!r}` is not callable.")
    penalties = [name for name in ("missing_eos_penalty", "length_penalty") if getattr(args, name, None)]
    if judge is not None and penalties:
        raise ValueError(
            f"{penalties} take something off a reward, and a `judge` gives none. Leave them out, or have the "
            "oracle prefer accordingly."
        )
    if processing_class is None:
        raise ValueError("`processing_class` must be provided: the tokenizer or processor of the model.")
    if compute_metrics is not None:
        raise ValueError(
            "`compute_metrics` would not be called: evaluation generates completions. Give a reward function; each "
            "one's mean is reported."
        )
    if ref_model is not None and ref_model is model:
        raise ValueError(
            "`model` and `ref_model` are the same object. Leave `ref_model` out to start from a copy of the model."
        )
    refuse_missing_path(model, "model")
    if reward_funcs is None:
        return []
    reward_funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    for reward in reward_funcs:
        if not isinstance(reward, str) and not callable(reward):
            raise ValueError(
                f"`reward_funcs` has {reward!r}, a {type(reward).__name__}; expected a function, a reward model, or the "
                "path or hub name of one."
            )
        if isinstance(reward, torch.nn.Module) and not (tokenizers or isinstance(reward, PreTrainedModel)):
            raise ValueError(
                f"`reward_funcs` has a {type(reward).__name__} without a tokenizer: give one in `reward_processing_classes`."
            )
        refuse_missing_path(reward, "reward model")
    return reward_funcs


def check_images(columns: list[str], args: Any, losses: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for what images exclude."""
    if "image" not in columns:
        return
    if args.num_generations % 2 or "bias_variance" in losses:
        raise ValueError("Prompts with images need an even `num_generations` and a loss other than bias_variance.")
    if getattr(args, "mixture_coef", 0):
        raise ValueError("Prompts with images are not sampled from a mixture; set `mixture_coef=0`.")
    if args.use_vllm:
        raise ValueError(
            "Prompts with images cannot be sampled with vLLM: TRL's method gives back no image tensors, so log-probabilities "
            "would be those of the text alone. Set `use_vllm=False`."
        )


def read_columns(available: list[str], split: str, losses: Mapping[str, Any], oracle: bool) -> list[str]:
    """
    The numeric columns of the prompts' dataset that a run reads: those of the losses, and `weight`.

    Args:
        available (`list[str]`):
            The dataset's columns.
        split (`str`):
            What the dataset is called in errors.
        losses (`dict[str, Loss]`):
            The losses, by name.
        oracle (`bool`):
            Whether a judge judges, which gives probabilities and win rates, but no rewards.

    Raises:
        `ValueError`: If there is no column `prompt`, or a loss requires a column that is not there.
    """
    if "prompt" not in available:
        raise ValueError(
            f"The {split} dataset has no column 'prompt'; its columns are {sorted(available)}. Online training reads "
            "prompts and generates completions itself."
        )
    read = []
    for name, loss in losses.items():
        for column in loss.required_columns:
            if column in SCORE_COLUMNS and oracle and not reads_win_rates(loss):
                raise ValueError(f"The loss {name!r} needs {column!r}: rewards, which a `judge` has not.")
            if column == "preference_prob" and not oracle:
                raise ValueError(f"The loss {name!r} needs {column!r}: give a `judge` in place of `reward_funcs`.")
            if column not in OWN_COLUMNS and column not in available:
                raise ValueError(
                    f"The loss {name!r} needs the column {column!r}, which the {split} dataset does not have. Its "
                    f"columns are {sorted(available)}."
                )
        read += [column for column in (*loss.required_columns, *loss.optional_columns) if column in available]
    read = [column for column in dict.fromkeys(read) if column not in OWN_COLUMNS and not _of_completions(column)]
    return [*read, *([WEIGHT] if WEIGHT in available else [])]


def check_prompts(
    dataset: Dataset | IterableDataset, columns: list[str], split: str, tokenizer: Any
) -> Dataset | IterableDataset:
    """
    The dataset, once its prompts and the numeric `columns` have been read and found usable.

    A stream is checked as it is read: its first row now, each other row when it comes, with the row's number.

    Raises:
        `ValueError`: For a prompt that is missing, empty, neither text nor messages, or of another kind than the first, for
            conversations without a chat template, and for numbers that cannot be used. Names the row.
    """
    dataset = checked(dataset, columns, {}, split)
    first = next(iter(dataset))["prompt"]
    _check_prompt(first, 0, split, first)
    if isinstance(first, list):
        require_chat_template(tokenizer if tokenizer.chat_template else getattr(tokenizer, "tokenizer", tokenizer))
    if isinstance(dataset, Dataset):
        prompts = dataset.select_columns(["prompt"]).with_format("arrow")[:]["prompt"]
        for row, prompt in enumerate(prompts):
            _check_prompt(prompt.as_py(), row, split, first)
        return dataset

    def check_row(example: dict, index: int) -> dict:
        _check_prompt(example["prompt"], index, split, first)
        return example

    return dataset.map(check_row, with_indices=True)


def _check_prompt(prompt: Any, row: int, split: str, first: Any) -> None:
    where = f"The prompt in row {row} of the {split} dataset"
    if not prompt and (prompt is None or isinstance(prompt, (str, list))):
        raise ValueError(f"{where} is empty: {prompt!r}. Remove the row.")
    messages = isinstance(prompt, list) and all(isinstance(each, dict) and "role" in each for each in prompt)
    if not messages and not isinstance(prompt, str):
        raise ValueError(
            f"{where} is a {type(prompt).__name__}: {prompt!r}. Expected text, or a list of messages with 'role' and 'content'."
        )
    if type(prompt) is not type(first):
        raise ValueError(
            f"{where} is a {type(prompt).__name__}, the first one a {type(first).__name__}. Give all as text, or all as messages."
        )


def check_rewards(name: str, loss: Any, columns: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` for pairs whose columns, the rewards among them, the loss cannot take."""
    bad = loss.check_columns(columns)
    if bad is None or not bad.any():
        return
    row = int(bad.nonzero()[0])
    shown = ", ".join(f"{column}={values[row].item():g}" for column, values in columns.items())
    hint = " A `judge` in place of `reward_funcs` gives win rates." if reads_win_rates(loss) else ""
    raise ValueError(
        f"The loss {name!r} cannot take {int(bad.sum())} of {len(bad)} pairs of this batch, the first with {shown}. "
        f"{loss.column_help} Online, scores are what `reward_funcs` give, times their weights, less penalties.{hint}"
    )
