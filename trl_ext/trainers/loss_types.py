"""From `loss_type`, `loss_weights` and `loss_kwargs` to losses: built once, refused early."""

import dataclasses
from typing import Any

from transformers import TrainingArguments

from trl_ext.data.checks import is_finite_number
from trl_ext.data.pairing import PAIRINGS
from trl_ext.losses import TRL_LOSS_TYPES, get_loss, list_aliases, loss_class, resolve_name
from trl_ext.losses.base import warn_once


# TRL loss types whose formula divides by beta
_TRL_DIVIDES_BY_BETA = ("ipo", "sppo_hard")
# TRL loss types that learn at `beta=0` too
_WITHOUT_BETA = ("sft",)


def resolve_loss_types(loss_type: str | list[str]) -> list[str]:
    """Canonical names; an unknown one, none at all, or one of ours twice is a `ValueError`."""
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(f"`loss_type={loss_type!r}` names no loss; give one name or a list of at least one.")
    joined = next((name for name in names if isinstance(name, str) and "," in name), None)
    if joined is not None:
        parts = [part.strip() for part in joined.split(",")]
        raise ValueError(
            f"`loss_type={joined!r}` is one name with a comma. Several losses are separated by spaces on the command line, "
            f"--loss_type {' '.join(parts)}, and are a list elsewhere: {parts}."
        )
    names = [resolve_name(name, also=TRL_LOSS_TYPES) for name in names]
    twice = {name for name in names if names.count(name) > 1 and name not in TRL_LOSS_TYPES}
    if twice:
        raise ValueError(f"`loss_type={loss_type!r}` names {sorted(twice)} twice; name it once and set its weight.")
    return names


def build_losses(names: list[str], loss_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """
    The losses of ours among canonical `names`, by name.

    Args:
        names (`list[str]`):
            Canonical loss types, TRL's among them.
        loss_kwargs (`dict[str, Any]` or `None`):
            Hyper-parameters: flat where one loss of ours is named, else a dict per loss, by its name or an alias.

    Raises:
        `ValueError`: For hyper-parameters that no loss would read, or that their loss refuses.
    """
    ours = [name for name in names if name not in TRL_LOSS_TYPES]
    if not isinstance(loss_kwargs, (dict, type(None))):
        raise ValueError(f"`loss_kwargs={loss_kwargs!r}` is a {type(loss_kwargs).__name__}; expected a dict.")
    if not loss_kwargs:
        return {name: get_loss(name) for name in ours}
    if not ours:
        raise ValueError(
            f"`loss_kwargs={loss_kwargs}` would be ignored: `loss_type={names}` names TRL's own loss types only, whose "
            "options are fields of `DPOConfig`."
        )
    # Dicts are those of losses, unless they are hyper-parameters of the only loss
    fields = {field.name for field in dataclasses.fields(loss_class(ours[0]))} if len(ours) == 1 else set()
    if all(isinstance(value, dict) for value in loss_kwargs.values()) and not fields.issuperset(loss_kwargs):
        keyed: dict[str, dict] = {}
        for given, values in loss_kwargs.items():
            name = resolve_name(given, also=TRL_LOSS_TYPES)
            if name not in ours:
                raise ValueError(
                    f"`loss_kwargs` has hyper-parameters for {given!r}, which `loss_type={names}` does not use: "
                    f"its losses with hyper-parameters here are {ours}. Remove them, or name the loss."
                )
            if name in keyed:
                raise ValueError(
                    f"`loss_kwargs` names {name!r} twice, by its name and by an alias of {list_aliases(name)}."
                )
            keyed[name] = values
    elif len(ours) == 1:
        keyed = {ours[0]: loss_kwargs}
    else:
        raise ValueError(
            f"`loss_kwargs={loss_kwargs}` is flat, but `loss_type={names}` names {len(ours)} losses that could take "
            f"it: {ours}. Give one dict per loss: {{{ours[0]!r}: {{...}}, {ours[1]!r}: {{...}}}}."
        )
    return {name: get_loss(name, **keyed.get(name, {})) for name in ours}


def check_pairing(pairing: str | None, losses: dict[str, Any]) -> None:
    """Raise a `ValueError` for a `pairing` that is unknown, or makes pairs of what `losses` learn from as whole groups alone."""
    if pairing is not None and pairing not in PAIRINGS:
        raise ValueError(f"`pairing={pairing!r}` is unknown; choose one of {list(PAIRINGS)}.")
    whole = [name for name, loss in losses.items() if not loss.takes_pairs]
    if whole and pairing not in (None, "group"):
        raise ValueError(
            f"`pairing={pairing!r}` makes pairs, and {whole} learn from whole groups alone. Leave it out, or set "
            '`pairing="group"`.'
        )


def check_combination(args: TrainingArguments, names: list[str], losses: dict[str, Any]) -> None:
    """Raise a `ValueError` for options that have no meaning together; `losses` are ours among `names`."""
    online = not hasattr(args, "f_divergence_type")
    betas = args.beta if online and isinstance(args.beta, (list, tuple)) else [args.beta]  # online: one per epoch
    for beta in betas or [None]:
        if not is_finite_number(beta) or beta < 0:
            raise ValueError(f"`beta={args.beta!r}` must be a finite number, at least 0.")
    if 0 in betas:
        divided = [name for name in names if name in _TRL_DIVIDES_BY_BETA]
        divided += [name for name, loss in losses.items() if loss.divides_by_beta]
        if divided:
            raise ValueError(f"`beta=0` has no meaning for {divided}, which divide by it. Set a positive `beta`.")
        flat = [name for name in names if name not in _WITHOUT_BETA and getattr(losses.get(name), "reads_beta", True)]
        if flat:
            warn_once(f"With `beta=0` the losses {flat} do not depend on the policy: they teach nothing.")
    weights = args.loss_weights
    if weights is not None:
        if not isinstance(weights, (list, tuple)):
            raise ValueError(f"`loss_weights={weights!r}` must be a list of numbers, one for each of {names}.")
        if len(weights) != len(names):
            raise ValueError(f"`loss_weights={weights}` has {len(weights)} weights for {len(names)} losses: {names}.")
        if not all(map(is_finite_number, weights)):
            raise ValueError(f"`loss_weights={weights}` must be finite numbers, one for each of {names}.")
    taught = [name for name, loss in losses.items() if "teachers" in loss.reads]
    if len(taught) > 1:
        raise ValueError(
            f"The losses {taught} all read teachers, of which a run computes one number per token. Train one of them at a time."
        )
    if taught and getattr(args, "logprob_backend", "auto") == "trl":
        raise ValueError(
            f"The loss {taught[0]!r} compares logits with those of its teachers, and TRL's forward gives log-probs of tokens alone. "
            "Set `logprob_backend` to 'auto'."
        )
    if not losses or online:
        return
    if args.f_divergence_type != "reverse_kl":
        raise ValueError(
            f"`f_divergence_type={args.f_divergence_type!r}` cannot be combined with {list(losses)}: their formulas "
            'hold for log-ratios only. Use the default `f_divergence_type="reverse_kl"`.'
        )
    if args.use_weighting:
        raise ValueError(
            f"`use_weighting=True` (WPO) cannot be combined with {list(losses)}: it is defined for TRL's own loss types. "
            "Set `use_weighting=False`, or give each pair a `weight` column."
        )
    if args.label_smoothing and len(losses) == len(names):
        raise ValueError(
            f"`label_smoothing={args.label_smoothing}` would be ignored: only TRL's robust, exo_pair and aot losses read "
            'it. For soft labels use `loss_type="anchored"` with `loss_kwargs={"label_smoothing": ...}`.'
        )
