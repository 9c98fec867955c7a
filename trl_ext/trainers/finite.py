"""A run whose weights are no longer numbers is stopped before it overwrites the checkpoints from which it could go on."""

import math
from typing import Any

import torch

from trl_ext.trainers.checkpoints import last_whole


def check_finite(trainer: Any, grad_norm: torch.Tensor | float | None) -> None:
    """
    Raise a `ValueError` where a step has left NaN or infinity. Called in every process after each optimizer step.

    Looks at the weights before they are saved, when training ends, and where the norm of the gradient that is logged is not finite.
    Transformers would go on: it leaves such losses out of what it logs.

    Args:
        trainer ([`~transformers.Trainer`]):
            Whose control says what this step ends with.
        grad_norm (`torch.Tensor` or `float`, *optional*):
            Of the step.
    """
    control = trainer.control
    # A gradient alone may overflow now and then, and clipping or a scaler leave the weights as they were
    suspect = control.should_log and grad_norm is not None and not math.isfinite(float(grad_norm))
    # An evaluation may find that this is the best checkpoint
    ends = control.should_save or control.should_evaluate or control.should_training_stop
    if (suspect or ends) and not _finite_weights(trainer):
        _stop(trainer)


def _finite_weights(trainer: Any) -> bool:
    """Whether all that is trained is finite, in all processes."""
    device = trainer.accelerator.device
    bad = torch.zeros((), device=device)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            value = getattr(parameter, "ds_tensor", parameter).detach()
            value = value.to_local() if hasattr(value, "to_local") else value
            bad += (~value.isfinite()).any().to(device)
    return not trainer.accelerator.reduce(bad, reduction="sum").item()


def _stop(trainer: Any) -> None:
    last = last_whole(trainer.args.output_dir)
    kept = (
        f"Nothing is saved of this step; {last} is the last checkpoint." if last else "No checkpoint was saved before."
    )
    raise ValueError(
        f"Training stops after step {trainer.state.global_step}: weights are NaN or infinite, and the model has nothing left to learn "
        "with. A loss or a log-probability was NaN or infinite, or the learning rate is too high. "
        f"{kept} Look at the last logged metrics, at the data of this step and at the dtype; lower the learning rate, then resume."
    )
