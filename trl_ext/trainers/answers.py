"""What losses give back, those of users and plug-ins among them: refused where nothing could be learnt from it."""

import numbers
from collections.abc import Mapping
from typing import Any

import torch

from trl_ext.losses import GroupBatch, PreferenceBatch


def check_shape(name: str, values: Any, rows: int) -> None:
    """Raise a `ValueError` for what is not one value per pair or group."""
    if not isinstance(values, torch.Tensor):
        raise ValueError(
            f"The loss {name!r} returned {values!r:.80}, a {type(values).__name__}; expected a tensor with one value per pair or "
            f"group, shape {(rows,)}."
        )
    if values.shape != (rows,):
        raise ValueError(
            f"The loss {name!r} returned shape {tuple(values.shape)}; expected one value per pair or group, shape {(rows,)}. "
            "Reduce over tokens or completions, not over pairs."
        )


def check_values(name: str, values: torch.Tensor, batch: PreferenceBatch | GroupBatch) -> None:
    """
    Raise a `ValueError` for values that do not depend on the policy, or are not finite.

    Args:
        name (`str`):
            The loss.
        values (`torch.Tensor` of shape `(B,)`):
            What it returned.
        batch ([`PreferenceBatch`] or [`GroupBatch`]):
            What it was given.
    """
    logps = [batch.chosen_logps, batch.rejected_logps] if isinstance(batch, PreferenceBatch) else [batch.logps]
    if not values.is_floating_point() or (any(each.requires_grad for each in logps) and not values.requires_grad):
        raise ValueError(
            f"The loss {name!r} returned {values.dtype} {'with' if values.requires_grad else 'without'} a gradient; expected "
            "floating-point numbers that depend on the policy's log-probabilities. Do not detach them, and count nothing in their place."
        )
    bad = ~values.detach().isfinite()
    if bad.any() and not all(bool(each.detach().isfinite().all()) for each in logps):
        raise ValueError(
            "The policy's log-probabilities of the first micro-batch are not finite, so nothing can be learnt: its weights may be NaN, or too "
            "large for the dtype they are in."
        )
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"The loss {name!r} returned {float(values[row])} for row {row} of its first micro-batch, of which the policy's "
            "log-probabilities are finite. Nothing can be learnt from it: look at its formula, its columns and its hyper-parameters."
        )


def check_metrics(name: str, metrics: Any, rows: int) -> None:
    """Raise a `ValueError` for metrics that are not numbers, or tensors with one value or one per pair or group, by name."""
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"`metrics` of the loss {name!r} gave {metrics!r:.80}; expected a dict of numbers and tensors."
        )
    for key, value in metrics.items():
        if not isinstance(key, str) or not isinstance(value, (torch.Tensor, numbers.Real)):
            raise ValueError(
                f"`metrics` of the loss {name!r} gave {key!r}: {value!r:.80}; expected a name and a number or a tensor."
            )
        if isinstance(value, torch.Tensor) and value.shape not in ((), (rows,)):
            raise ValueError(
                f"The metric {key!r} of the loss {name!r} has shape {tuple(value.shape)}; expected a number, or {(rows,)}, one "
                "value per pair or group."
            )


def check_state(name: str, method: str, state: Any) -> None:
    """Raise a `ValueError` for a state that is no dict of tensors; `method` gave it."""
    tensors = isinstance(state, Mapping) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    )
    if not tensors:
        raise ValueError(f"`{method}` of the loss {name!r} gave {state!r:.120}; expected a dict of tensors, by name.")
