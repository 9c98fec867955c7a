"""TRL's own loss: run with one term of it, with a reference that is given to it, and what it has logged taken back."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from trl import DPOTrainer
from trl.trainer import dpo_trainer

from trl_ext.logprobs.substitute import Substitute


# What TRL's loss logs from each per-token statistic
METRICS_OF = {
    "entropy": ("entropy",),
    "mean_logits": ("logits/chosen", "logits/rejected"),
    "is_top1": ("mean_token_accuracy",),
}


# What TRL's loss logs of pairs, each the mean over the rows of the batch, in the order of its own code
PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def forget_metrics(trainer: DPOTrainer, names: Iterable[str]) -> None:
    """Take back the last value that TRL's loss has logged under each of the names."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name in names:
        metrics[name].pop()
        if not metrics[name]:
            del metrics[name]  # TRL divides by the number of values


def forget_statistics(trainer: DPOTrainer, measured: tuple[str, ...]) -> None:
    """Take back what TRL's loss has just logged from statistics that were not measured in this batch."""
    for statistic, names in METRICS_OF.items():
        if statistic not in measured:
            forget_metrics(trainer, names)


@contextlib.contextmanager
def only_term(trainer: DPOTrainer, name: str, record: bool) -> Iterator[None]:
    """
    While open, TRL's loss has one loss type, with weight 1.

    Unless `record` is set, it has no auxiliary loss either, and what it logs and counts is forgotten.
    """
    names = ("loss_types", "loss_weights")
    if not record:
        names += ("aux_loss_enabled", "_metrics", "_total_train_tokens")
    before = {attribute: getattr(trainer, attribute) for attribute in names}
    trainer.loss_types, trainer.loss_weights = [name], [1.0]
    if not record:
        trainer.aux_loss_enabled = False
        trainer._metrics = {mode: defaultdict(list) for mode in before["_metrics"]}
    try:
        yield
    finally:
        for attribute, value in before.items():
            setattr(trainer, attribute, value)


@contextlib.contextmanager
def reference_in_inputs(trainer: DPOTrainer) -> Iterator[None]:
    """While open, TRL's loss reads the reference log-probs from the batch, as it does when they are precomputed."""
    precomputed = trainer.precompute_ref_logps
    trainer.precompute_ref_logps = True
    try:
        yield
    finally:
        trainer.precompute_ref_logps = precomputed


@contextlib.contextmanager
def no_reference(model: Any) -> Iterator[None]:
    """While open, `trl.DPOTrainer.__init__`, given `model` and no reference, loads none: the policy is all that it loads, if anything."""
    with _LOADER.acting(["policy"] if isinstance(model, str) else []):
        yield


def _install_loader(current: ContextVar) -> Callable[[], None]:
    """Have TRL's trainer load what is left to load in the thread that builds it, and then nothing."""
    load = dpo_trainer.create_model_from_path

    def create_model_from_path(*args: Any, **kwargs: Any) -> Any:
        left = current.get()
        if left is not None and not left:
            return None
        if left:
            left.pop()
        return load(*args, **kwargs)

    dpo_trainer.create_model_from_path = create_model_from_path

    def remove() -> None:
        dpo_trainer.create_model_from_path = load

    return remove


_LOADER = Substitute(_install_loader)
