"""Options of training: numbers, booleans and JSON, looked at when a config is built and not where a step divides by them."""

import math
import numbers
import types
import typing
from typing import Any

from trl_ext.data.checks import is_finite_number
from trl_ext.reading import read_json


# Smallest and largest value of what may be a fraction, of what is whole, and of what matters where the reference follows alone
FRACTIONS = {
    "learning_rate": (0, None),
    "weight_decay": (0, None),
    "num_train_epochs": (0, None),
    "max_steps": (-1, None),
    "warmup_steps": (0, None),
    "label_smoothing": (0, 1),
    "ld_alpha": (0, 1),
    "f_alpha_divergence_coef": (None, None),
    "discopop_tau": (None, None),
    "router_aux_loss_coef": (0, None),
    "temperature": (0, None),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, None),
}
WHOLE = {
    "max_length": (1, None),
    "max_new_tokens": (1, None),
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "precompute_ref_batch_size": (1, None),
    "dataset_num_proc": (0, None),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
OF_SYNC = {"ref_model_mixup_alpha": (0, 1)}
WHOLE_OF_SYNC = {"ref_model_sync_steps": (1, None)}
# What something is divided by, or of which nothing would be left to sample from
NOT_ZERO = ("top_p", "repetition_penalty", "discopop_tau")
# Keyword arguments, which are handed on as they are
KEYWORDS = ("model_init_kwargs", "teacher_model_init_kwargs", "generation_kwargs")


def check_options(args: Any) -> None:
    """
    Raise a `ValueError` for an option of a training config that is text where it has to be a number or a boolean, NaN, out of range, or
    broken JSON.

    Args:
        args ([`~transformers.TrainingArguments`]):
            A config while it is built.
    """
    hints = {name: hint for name, hint in typing.get_type_hints(type(args)).items() if hasattr(args, name)}
    for name, hint in hints.items():
        allowed = _classes(hint)
        if isinstance(getattr(args, name), str) and allowed <= {int, float, bool, type(None)}:
            raise ValueError(f"`{name}={getattr(args, name)!r}` is text; expected {_words(allowed)}.")
    of_sync = (OF_SYNC | WHOLE_OF_SYNC) if getattr(args, "sync_ref_model", False) else {}
    for name, (least, most) in (FRACTIONS | WHOLE | of_sync).items():
        if name in hints and not (getattr(args, name) is None and type(None) in _classes(hints[name])):
            _check_number(name, getattr(args, name), least, most)
    limit = args.max_grad_norm
    if limit is not None and (not isinstance(limit, numbers.Real) or math.isnan(limit)):
        raise ValueError(f"`max_grad_norm={limit!r}` must be a number, or None for no limit.")
    if "robust" in args.loss_type and getattr(args, "label_smoothing", 0) >= 0.5:
        raise ValueError(
            f"`label_smoothing={args.label_smoothing!r}` must be less than 0.5 for TRL's `robust`, which divides by 1 - 2 label_smoothing."
        )
    _check_keywords(args)


def refuse_dropped_data(trainer: Any) -> None:
    """Raise a `ValueError` where `dataloader_drop_last` drops every row: training would end at once, with a warning."""
    data, args = trainer.train_dataset, trainer.args
    if data is None or not hasattr(data, "__len__") or not args.dataloader_drop_last:
        return
    shared = trainer.accelerator.split_batches  # one batch, cut for the processes
    batch = args.train_batch_size * (1 if shared else trainer.accelerator.num_processes)
    if 0 < len(data) < batch:
        raise ValueError(
            f"`dataloader_drop_last=True` would drop all {len(data)} rows of the train dataset: a batch of all processes has {batch}. Lower "
            "`per_device_train_batch_size`, or leave `dataloader_drop_last` out."
        )


def _check_number(name: str, value: Any, least: float | None, most: float | None) -> None:
    whole = name in WHOLE or name in WHOLE_OF_SYNC
    if is_finite_number(value) and (isinstance(value, numbers.Integral) or not whole):
        inside = (least is None or value >= least) and (most is None or value <= most)
        if inside and (value or name not in NOT_ZERO):
            return
    bounds = ["a whole number" if whole else "a finite number"]
    bounds += [f"at least {least}"] if least is not None else []
    bounds += [f"at most {most}"] if most is not None else []
    bounds += ["not 0"] if name in NOT_ZERO else []
    raise ValueError(f"`{name}={value!r}` must be {', '.join(bounds)}.")


def _check_keywords(args: Any) -> None:
    for name in type(args)._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        if isinstance(value, str) and value.startswith("{"):
            try:
                read_json(value)
            except ValueError as error:
                raise ValueError(f"`{name}={value!r:.200}` is not JSON ({error}).") from error
        elif name in KEYWORDS and not isinstance(value, (dict, type(None))):
            raise ValueError(
                f"`{name}={value!r:.200}` is a {type(value).__name__}; expected a dict, or a JSON object as text."
            )


def _classes(hint: Any) -> set[Any]:
    """The classes of a union, else the one there is."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return set(typing.get_args(hint)) if union else {hint}


def _words(kinds: set[type]) -> str:
    words = {int: "a number", float: "a number", bool: "True or False", type(None): "None"}
    return " or ".join(dict.fromkeys(word for kind, word in words.items() if kind in kinds))
