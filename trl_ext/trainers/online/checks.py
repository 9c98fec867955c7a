"""What can be said about an online run before it begins, and about rewards before they are learnt from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from trl_ext.data.classifier import refuse_preference_model
from trl_ext.data.columns import SCORES, TEXT_COLUMNS
from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.preference_model import PreferenceModel
from trl_ext.data.rewards import RewardModel, read_columns
from trl_ext.data.tokens import require_chat_template


SCORE_COLUMNS = SCORES
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
        unknown = [column for column in loss.required_columns if of_completions(column)]
        if unknown:
            raise ValueError(
                f"The loss {name!r} reads {unknown}, one value for each completion, which cannot be known before the "
                "completions are sampled. Train it offline: `trl_ext.DPOTrainer`, or `trl-ext iterate` for several rounds."
            )


def of_completions(column: str) -> bool:
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


def learns_without_scores(losses: Mapping[str, Any]) -> bool:
    """Whether all losses learn from completions, whatever they are worth."""
    return all("teachers" in loss.reads for loss in losses.values())


def check_arguments(
    losses: Mapping[str, Any],
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
    scored = not (reward_funcs is None or reward_funcs == [])
    if learns_without_scores(losses) and not scored and judge is None:
        if args.pairing != "group":
            raise ValueError(
                f"`pairing={args.pairing!r}` prefers one completion to another, and there are no `reward_funcs` and no `judge`. Set "
                f'`pairing="group"`: {list(losses)} then learn from every completion.'
            )
    elif scored == (judge is not None):
        given = "neither" if judge is None else "both"
        raise ValueError(
            f"Completions are judged by `reward_funcs` or by a `judge`; got {given}. Give one of the two."
        )
    if judge is not None and not callable(judge):
        raise ValueError(f"`judge={judge!r}` is not callable.")
    if isinstance(judge, (torch.nn.Module, RewardModel)):
        raise ValueError(
            f"`judge` is a {type(judge).__name__}, which compares no two completions. A general preference model is given as "
            "`judge=PreferenceModel(model)`, a reward model as `reward_funcs`."
        )
    penalties = [name for name in ("missing_eos_penalty", "length_penalty") if getattr(args, name, None)]
    if judge is None and not scored and penalties:
        raise ValueError(f"{penalties} take something off a reward, and there are no `reward_funcs`. Leave them out.")
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
        if isinstance(reward, PreferenceModel):
            raise ValueError(
                "`reward_funcs` has a PreferenceModel, which compares two completions: give it as `judge`."
            )
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
        refuse_preference_model(reward)
    return reward_funcs


def check_preference_model(judge: PreferenceModel, prompt: Any) -> None:
    """Load a judge, and raise a `ValueError` for one that cannot compare completions of such prompts, or not online."""
    if judge.scores != "win_rate":
        raise ValueError(
            f"`judge` has `scores={judge.scores!r}`, which groups get in `score_preferences` and in rounds. Online, losses learn from "
            "win rates: leave `scores` out."
        )
    judge.load()
    if isinstance(prompt, list):
        require_chat_template(judge.processing_class)


def check_reward_columns(reward_funcs: Sequence[Any], available: Sequence[str], split: str) -> None:
    """Raise a `ValueError` where a dataset lacks a column that a reward function says that it reads, by an attribute `columns`."""
    for reward in reward_funcs:
        missing = [name for name in read_columns(reward) if name not in available]
        if missing:
            raise ValueError(
                f"The reward function {reward!r} reads {missing}, which the {split} dataset does not have. Its columns are "
                f"{sorted(available)}."
            )


def _shown(value: torch.Tensor) -> str:
    return f"{value.item():g}" if value.dim() == 0 else f"[{', '.join(f'{each:g}' for each in value.tolist())}]"


def check_rewards(name: str, loss: Any, columns: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` for pairs whose columns, the rewards among them, the loss cannot take."""
    bad = loss.check_columns(columns)
    if bad is None or not bad.any():
        return
    row = int(bad.nonzero()[0])
    shown = ", ".join(f"{column}={_shown(values[row])}" for column, values in columns.items())
    hint = " A `judge` in place of `reward_funcs` gives win rates." if reads_win_rates(loss) else ""
    raise ValueError(
        f"The loss {name!r} cannot take {int(bad.sum())} of {len(bad)} pairs of this batch, the first with {shown}. "
        f"{loss.column_help} Online, scores are what `reward_funcs` give, times their weights, less penalties.{hint}"
    )
