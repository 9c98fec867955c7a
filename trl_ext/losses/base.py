"""What every loss shares: checked hyper-parameters, what it states about itself, and the plain pair losses of TRL."""

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F

from .batch import PreferenceBatch


def check_hyperparameters(loss: object) -> None:
    """Raise a `ValueError` for a hyper-parameter of the wrong type, or one that is NaN or infinite."""
    hints = typing.get_type_hints(type(loss))
    for field in dataclasses.fields(loss):
        value, hint = getattr(loss, field.name), hints[field.name]
        allowed = typing.get_args(hint) or (hint,)
        expected = " or ".join(
            "None" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed
        )
        where = f"{type(loss).__name__}: `{field.name}={value!r}`"
        if isinstance(value, bool):
            if bool not in allowed:
                raise ValueError(f"{where} is a bool; expected {expected}.")
        elif isinstance(value, (int, float)) and (float in allowed or int in allowed):
            if not math.isfinite(value):
                raise ValueError(f"{where} is not finite; expected a finite {expected}.")
            if float not in allowed and not isinstance(value, int):
                raise ValueError(f"{where} is not a whole number; expected {expected}.")
        elif all(isinstance(kind, type) for kind in allowed) and not isinstance(value, allowed):
            raise ValueError(f"{where} is a {type(value).__name__}; expected {expected}.")


@dataclasses.dataclass(frozen=True)
class Loss:
    """
    Base of the losses: a frozen dataclass of hyper-parameters that maps a batch to one loss a pair.

    Class attributes:
        paper (`str`): arXiv ids, comma separated.
        title (`str`): Title of the paper.
        citation (`str`): BibTeX entry for the model card.
        columns (`tuple[str, ...]`): Dataset columns the loss requires.
        optional_columns (`tuple[str, ...]`): Dataset columns it uses where they are there.
        needs_reference (`bool`): Whether it reads the reference log-probabilities.
        takes_groups (`bool`): Whether it also accepts a [`GroupBatch`].
    """

    paper: ClassVar[str] = ""
    title: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    optional_columns: ClassVar[tuple[str, ...]] = ()
    needs_reference: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = False

    def __post_init__(self):
        check_hyperparameters(self)

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        """Unreduced loss, shape `(B,)`, in the dtype of the log-probs."""
        raise NotImplementedError

    def metrics(self, batch: PreferenceBatch) -> dict[str, torch.Tensor]:
        """Detached scalars worth plotting, by name."""
        return {}

    def check_columns(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """
        Which rows of a dataset this loss cannot take.

        Args:
            columns (`dict[str, torch.Tensor]`):
                The dataset's numeric columns that the loss reads, each of shape `(N,)`, finite.

        Returns:
            `torch.Tensor` of shape `(N,)` or `None`: `True` where a row is unusable; `None` if every row can be used.
        """
        return None

    @property
    def column_help(self) -> str:
        """What to do about the rows that `check_columns` marks, for the error text."""
        return ""

    @property
    def required_columns(self) -> tuple[str, ...]:
        """`columns`, and what these hyper-parameters require on top."""
        return self.columns

    @property
    def divides_by_beta(self) -> bool:
        """Whether `beta=0` has no meaning for these hyper-parameters."""
        return False

    @property
    def reads_beta(self) -> bool:
        """Whether `beta` scales the policy's part of the loss, so that at `beta=0` nothing is learnt."""
        return True

    def remark(self, columns: Collection[str]) -> str:
        """What a user should know who trains this loss on a dataset with these columns; `""` for nothing."""
        return ""


def sigmoid(batch: PreferenceBatch) -> torch.Tensor:
    """DPO: `-log sigmoid(beta * delta)` (2305.18290, Eq. 7), as TRL's `sigmoid`."""
    return -F.logsigmoid(batch.beta * batch.delta)


def hinge(batch: PreferenceBatch) -> torch.Tensor:
    """SLiC: `max(0, 1 - beta * delta)` (2305.10425), as TRL's `hinge`."""
    return torch.relu(1 - batch.beta * batch.delta)


def ipo(batch: PreferenceBatch) -> torch.Tensor:
    """IPO on log-ratios a token (2310.12036, Eq. 17), as TRL's `ipo`: lengths are clamped to 1."""
    chosen = batch.chosen_logratios / batch.chosen_lengths.clamp(min=1)
    rejected = batch.rejected_logratios / batch.rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * batch.beta)) ** 2


@dataclasses.dataclass(frozen=True)
class SigmoidLoss(Loss):
    """TRL's `sigmoid` as a loss on a batch, where a `weight` column scales its pairs one at a time."""

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        return sigmoid(batch)


PLAIN_LOSSES = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}
