"""What every loss shares: checked hyper-parameters, what it states about itself, and the plain pair losses of TRL."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F

from .batch import GroupBatch, PreferenceBatch
from .hyperparameters import check_hyperparameters


logger = logging.getLogger(__name__)

READABLE = ("ref_logps", "token_logps", "behaviour_logps", "teachers")


@functools.cache
def warn_once(message: str) -> None:
    """A warning that a process gives once: a loss is built by the config and again by the trainer."""
    logger.warning(message)


def refuse_values(bad: torch.Tensor, message: str) -> None:
    """
    Raise a `ValueError` that counts the rows marked in `bad`, shape `(B,)`, and goes on with `message`.

    On a CPU only: to look at values on another device makes the host wait for it. The trainers have checked their columns
    before; this is for batches made by hand.
    """
    if bad.device.type == "cpu" and bad.any():
        raise ValueError(f"{int(bad.sum())} of {len(bad)} rows: {message}")


def averages(batch: PreferenceBatch, of: str = "logps") -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probability per token of the chosen and of the rejected completion, shape `(B,)` each, nats.

    Lengths are clamped to 1: a completion of which truncation left nothing has 0.

    Args:
        batch ([`PreferenceBatch`]):
            The pairs.
        of (`str`, *optional*, defaults to `"logps"`):
            `"logps"` under the policy, or `"logratios"` of policy to reference.
    """
    chosen, rejected = (getattr(batch, f"{side}_{of}") for side in ("chosen", "rejected"))
    return chosen / batch.chosen_lengths.clamp(min=1), rejected / batch.rejected_lengths.clamp(min=1)


@dataclasses.dataclass(frozen=True)
class Loss:
    """
    Base of the losses: a frozen dataclass of hyper-parameters that maps a batch to one loss per pair.

    Hyper-parameters are numbers, strings, or lists, tuples and dicts of them; their values are checked against the types that
    the dataclass states.

    Class attributes:
        paper (`str`): arXiv ids, comma separated.
        title (`str`): Title of the paper.
        citation (`str`): BibTeX entry for the model card.
        evidence (`str`): How sure the formula is, in a sentence, where it was read neither in the paper nor in its authors' code:
            third party, recalled, or ours. `trl-ext losses NAME` shows it, and a trainer says it once in the log.
        one_turn (`str`): What a user should know where every completion has one assistant turn; a trainer says it once.
        columns (`tuple[str, ...]`): Dataset columns the loss requires.
        optional_columns (`tuple[str, ...]`): Dataset columns it uses where they are there.
        reads (`frozenset[str]`): What it is given beside the policy's log-probabilities of whole completions; what no loss in
            use reads does not exist in that run. A property where it depends on hyper-parameters. Of

            - `"ref_logps"`: those of the reference. Without it a batch may hold `None` in their place, and log-ratios then
              raise a `ValueError`; where no loss reads it, there is no reference model and no second forward;
            - `"token_logps"`: `PreferenceBatch.tokens`, the log-probabilities of each token, and its turn;
            - `"behaviour_logps"`: `GroupBatch.behaviour_logps`, those under the policy that sampled;
            - `"teachers"`: `PreferenceBatch.chosen_divergences` or `GroupBatch.divergences`, what `per_token` makes of the logits
              of the policy and of two more models that the trainer is given.
        update_first (`bool`): Whether the loss reads the state that has taken the micro-batch in, else the one before.
        takes_groups (`bool`): Whether it accepts a [`GroupBatch`].
        takes_pairs (`bool`): Whether it accepts a [`PreferenceBatch`]; one of the two at least. A loss on whole groups alone says
            `takes_groups = True` and `takes_pairs = False`: `pairing` is then "group" by default, and pairs are refused when the
            trainer is built.
        takes_lists (`bool`): Whether `score_chosen` and `score_rejected` may hold a list in each row, one number per reward
            model: `batch.column(name, lists=True)` then has the shape `(B, M)`. Where they are numbers it is given `(B,)`, as
            every loss. A loss that does not say so is never given lists: where it stands beside one that does, scores have to be
            numbers.
    """

    paper: ClassVar[str] = ""
    title: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    evidence: ClassVar[str] = ""
    one_turn: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    optional_columns: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[frozenset[str]] = frozenset({"ref_logps"})
    update_first: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = False
    takes_pairs: ClassVar[bool] = True
    takes_lists: ClassVar[bool] = False

    def __post_init__(self):
        check_hyperparameters(self)

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        """Unreduced loss, shape `(B,)`, in the dtype of the log-probs."""
        raise NotImplementedError

    def per_token(
        self, logits: torch.Tensor, teacher_logits: torch.Tensor, reverse_logits: torch.Tensor
    ) -> torch.Tensor:
        """
        What a loss whose `reads` holds `"teachers"` says of each token: a pure function, row by row.

        The trainers call it on a few tokens at a time, so that no model's logits are in memory at once, and hand the loss
        its sums over the tokens of each completion.

        Args:
            logits (`torch.Tensor` of shape `(n, V)`):
                Logits of the policy, in float32 or wider. The one argument with a gradient.
            teacher_logits (`torch.Tensor` of shape `(n, V)`):
                Those of the teacher at the same tokens.
            reverse_logits (`torch.Tensor` of shape `(n, V)`):
                Those of the reverse teacher.

        Returns:
            `torch.Tensor` of shape `(n,)`.
        """
        raise NotImplementedError

    def metrics(self, batch: PreferenceBatch | GroupBatch) -> dict[str, float | torch.Tensor]:
        """
        What is worth plotting, by name.

        Returns:
            `dict[str, float | torch.Tensor]`: For each name one of

            - a `float` or a tensor of shape `()`: one value for the batch. The trainers average it over processes;
            - a tensor of shape `(B,)`: one value per row (pair or group), NaN where a row has none. The trainers average it
              over the rows of all processes that have one, so that processes with few such rows count little.

            Tensors are detached.
        """
        return {}

    def init_state(self) -> dict[str, torch.Tensor]:
        """
        What the loss remembers between micro-batches, by name, before the first one; `{}` for nothing.

        The trainer moves it to its device, hands it over as `batch.state`, and saves it in checkpoints. In evaluation it
        stands still. A new trainer, such as that of a second stage or of the next round, begins with it anew; a resumed one
        goes on with what the checkpoint holds.
        """
        return {}

    def update(
        self,
        state: Mapping[str, torch.Tensor],
        batch: PreferenceBatch | GroupBatch,
        reduce: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda sums: sums,
    ) -> dict[str, torch.Tensor]:
        """
        The state after a micro-batch.

        The trainer calls it in training only, on every process for every micro-batch, without gradients.

        Args:
            state (`dict[str, torch.Tensor]`):
                The state before; to be read, not to be changed in place.
            batch ([`PreferenceBatch`] or [`GroupBatch`]):
                The micro-batch of this process. It may hold fewer rows than on another process, none at all included.
            reduce (`Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]`, *optional*):
                Adds a dict of tensors up over the processes, name by name. A state that is built from reduced sums and counts
                is equal on all of them; every process has to call it equally often, with the same names and shapes.

        Returns:
            `dict[str, torch.Tensor]`: The state after, with the names, shapes and dtypes of `init_state`.
        """
        return dict(state)

    def summary(self, state: Mapping[str, torch.Tensor]) -> str:
        """What the `state` at the end of training says about the data, which the trainer then prints; `""` for nothing."""
        return ""

    def check_columns(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """
        Which rows of a dataset this loss cannot take.

        Args:
            columns (`dict[str, torch.Tensor]`):
                The dataset's numeric columns that the loss reads, each of shape `(N,)`, finite; `(N, M)` where they are lists,
                which a loss is given that `takes_lists`.

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
    """IPO on log-ratios per token (2310.12036, Eq. 17), as TRL's `ipo`: lengths are clamped to 1."""
    chosen, rejected = averages(batch, "logratios")
    return (chosen - rejected - 1 / (2 * batch.beta)) ** 2


@dataclasses.dataclass(frozen=True)
class SigmoidLoss(Loss):
    """TRL's `sigmoid` as a loss on a batch, where a `weight` column scales each pair."""

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        return sigmoid(batch)


@dataclasses.dataclass(frozen=True)
class HingeLoss(Loss):
    """TRL's `hinge` as a loss on a batch."""

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        return hinge(batch)


@dataclasses.dataclass(frozen=True)
class IPOLoss(Loss):
    """TRL's `ipo` as a loss on a batch."""

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        return ipo(batch)

    @property
    def divides_by_beta(self) -> bool:
        return True


PLAIN_LOSSES = {"sigmoid": SigmoidLoss(), "hinge": HingeLoss(), "ipo": IPOLoss()}
