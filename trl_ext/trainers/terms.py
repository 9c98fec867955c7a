"""The losses of a run, once for both trainers: their weights and state, their sum, what they log, what a checkpoint keeps of them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trl_ext.data.columns import WEIGHT
from trl_ext.losses import GroupBatch, Loss, PreferenceBatch
from trl_ext.losses.bias_variance import present
from trl_ext.reading import read_json, read_text
from trl_ext.rows import Plan, Scored
from trl_ext.trainers.answers import check_metrics, check_shape, check_state, check_values


LOSSES_FILE = "losses.json"
STATE_FILE = "loss_state.safetensors"

CUT_OFF = "It may have been cut off while it was written: resume from another checkpoint."

Sums = dict[str, torch.Tensor]


class Terms:
    """
    Losses with their weights and what they remember.

    Args:
        losses (`dict[str, Loss]`):
            Those that are computed here, by name.
        weights (`dict[str, float]`):
            Their weights.
        theirs (`dict[str, float]`, *optional*):
            Weights of the loss types that TRL computes.
        can_be_empty (`bool`, *optional*, defaults to `False`):
            Whether a micro-batch may teach nothing, in one process or in all of them.
    """

    def __init__(
        self,
        losses: Mapping[str, Any],
        weights: Mapping[str, float],
        theirs: Mapping[str, float] | None = None,
        can_be_empty: bool = False,
    ):
        self.losses, self.weights, self.theirs = dict(losses), dict(weights), dict(theirs or {})
        self.can_be_empty = can_be_empty
        self.state = {name: state for name, loss in self.losses.items() if (state := _first_state(name, loss))}
        self._looked_at: set[tuple[str, bool]] = set()
        self._updates: Counter[str] = Counter()

    @property
    def reads(self) -> frozenset[str]:
        """What any of the losses reads; what none reads does not exist in the run. TRL's read the reference."""
        ours = frozenset().union(*(loss.reads for loss in self.losses.values()))
        return ours | {"ref_logps"} if self.theirs or not self.losses else ours

    @property
    def all_weights(self) -> dict[str, float]:
        """Weight of each loss of the run, TRL's own first."""
        return self.theirs | self.weights

    @property
    def described(self) -> dict[str, Any]:
        """The losses with a paper."""
        return {name: loss for name, loss in self.losses.items() if loss.paper}

    def total(
        self,
        scored: Scored,
        plan: Plan,
        beta: float,
        training: bool,
        reduce: Callable[[Sums], Sums],
    ) -> tuple[torch.Tensor, dict[str, Any], dict[str, torch.Tensor]]:
        """
        Weighted sum of the losses, each a mean over pairs or groups; the metrics of the micro-batch; and each loss by itself.

        Args:
            scored ([`~trl_ext.rows.Scored`]):
                Log-probabilities of the rows.
            plan ([`~trl_ext.rows.Plan`]):
                What is learnt from them.
            beta (`float`):
                Temperature.
            training (`bool`):
                Whether the losses' state takes the micro-batch in.
            reduce (`Callable`):
                Adds a dict of tensors up over processes.
        """
        pairs = scored.pair_batch(plan, beta)
        groups = None if plan.groups is None else scored.group_batch(plan, beta)
        rows = len(plan.pairs)
        metrics = _of_pairs(pairs) if rows else {}
        total = torch.zeros((), dtype=scored.logps.dtype, device=scored.logps.device)
        terms = {f"loss/{name}": total for name in self.losses}
        moving = bool(training and self.state)
        if moving and self.can_be_empty:
            moving = bool(reduce({"rows": torch.tensor(float(rows), device=total.device)})["rows"])
        for name, loss in self.losses.items():
            batch = groups if groups is not None and loss.takes_groups else pairs
            moves = moving and name in self.state
            if moves and loss.update_first:
                self._move(name, batch, reduce)
            batch = self._with_state(name, batch)
            if rows:
                per_row = self._per_row(name, batch, rows)
                per_row = per_row if plan.share is None else per_row * plan.share.to(per_row.dtype)
                terms[f"loss/{name}"] = per_row.sum() / (plan.count or rows)
                total = total + self.weights[name] * terms[f"loss/{name}"]
                for key, value in self._metrics(name, batch, rows).items():
                    metrics[f"{name}/{key}" if key in metrics else key] = value
            if moves and not loss.update_first:
                self._move(name, batch, reduce)
        return total, metrics, terms

    def _per_row(self, name: str, batch: PreferenceBatch | GroupBatch, rows: int) -> torch.Tensor:
        values = self.losses[name](batch)
        check_shape(name, values, rows)
        look = (name, torch.is_grad_enabled())
        if look not in self._looked_at:  # once: a GPU is waited for
            self._looked_at.add(look)
            check_values(name, values, batch)
        return values

    def _metrics(self, name: str, batch: PreferenceBatch | GroupBatch, rows: int) -> dict[str, Any]:
        metrics = self.losses[name].metrics(batch)
        check_metrics(name, metrics, rows)
        return metrics

    # State

    def _with_state(self, name: str, batch: Any) -> Any:
        if name not in self.state:
            return batch
        device = batch.chosen_logps.device if isinstance(batch, PreferenceBatch) else batch.logps.device
        self.state[name] = {key: value.to(device) for key, value in self.state[name].items()}
        return dataclasses.replace(batch, state=self.state[name])

    def _move(self, name: str, batch: Any, reduce: Callable[[Sums], Sums]) -> None:
        """Let the state of a loss take the micro-batch in."""
        batch = self._with_state(name, batch)
        before = self.state[name]
        with torch.no_grad():
            after = self.losses[name].update(before, batch, reduce)
        check_state(name, "update", after)
        forms = [_forms(state) for state in (before, after)]
        if forms[0] != forms[1]:
            raise ValueError(
                f"`update` of the loss {name!r} gave the state {forms[1]}; expected that of `init_state`, {forms[0]}."
            )
        self.state[name] = {key: value.detach() for key, value in after.items()}
        self._updates[name] += 1
        # Seldom, and again: a policy that is its reference gives all processes the same at first
        if self._updates[name].bit_count() == 1 and PartialState().num_processes > 1:
            first, *others = gather_object([{key: value.tolist() for key, value in after.items()}])
            if any(other != first for other in others):
                raise ValueError(
                    f"The state of the loss {name!r} differs between processes, so each would train another "
                    "objective. Its `update` has to build it from sums and counts that went through `reduce`."
                )

    def summary(self) -> str:
        """What the losses have found out about the data; `""` for nothing."""
        found = {name: self.losses[name].summary(state) for name, state in self.state.items()}
        return "\n\n".join(f"{name}\n{text}" for name, text in found.items() if text)

    # Checkpoints

    def _on_paper(self) -> dict[str, Any]:
        """Each loss with its weight and hyper-parameters, as JSON has it."""
        described = {
            name: {"weight": weight, **(dataclasses.asdict(self.losses[name]) if name in self.losses else {})}
            for name, weight in self.all_weights.items()
        }
        return json.loads(json.dumps(described, default=str))

    def save(self, folder: str | Path) -> None:
        """Write losses and state into a checkpoint, for [`load`]. Called in one process: the state is the same in all."""
        (Path(folder) / LOSSES_FILE).write_text(json.dumps(self._on_paper(), indent=2) + "\n")
        tensors = {f"{name}/{key}": value for name, state in self.state.items() for key, value in state.items()}
        if tensors:
            # Two names may have one tensor, which the format refuses
            save_file(
                {key: value.cpu().contiguous().clone() for key, value in tensors.items()}, Path(folder) / STATE_FILE
            )

    def load(self, folder: str | Path) -> None:
        """
        Take the state from a checkpoint.

        Raises:
            `ValueError`: If the checkpoint was trained with other losses, or lacks the state of one. A checkpoint that says
                nothing of losses, such as one of TRL's own trainer, passes where no loss keeps state.
        """
        path, now = Path(folder) / LOSSES_FILE, self._on_paper()
        before = _read_losses(path) if path.exists() else now
        if before != now:
            raise ValueError(
                f"The checkpoint {folder} was trained with the losses {before}, and this run has {now}. A resumed run continues "
                "the same objective: restore these settings, or start a new run from the checkpoint's model (`model=` that "
                "folder, without `resume_from_checkpoint`)."
            )
        if not self.state:
            return
        path = Path(folder) / STATE_FILE
        try:
            saved = load_file(path) if path.exists() else {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The file {str(path)!r} cannot be read: {error}. {CUT_OFF}") from error
        wanted = {f"{name}/{key}": value for name, state in self.state.items() for key, value in state.items()}
        if _forms(saved) != _forms(wanted):
            raise ValueError(
                f"The checkpoint {folder} holds the state {_forms(saved)} of losses; this run needs {_forms(wanted)} ({STATE_FILE}). "
                "Resume from a checkpoint that was saved with it, or start a new run from the checkpoint's model."
            )
        self.state = {name: {key: saved[f"{name}/{key}"] for key in state} for name, state in self.state.items()}


def _read_losses(path: Path) -> Any:
    try:
        return read_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"The file {str(path)!r} cannot be read: {error}. {CUT_OFF}") from error


def _first_state(name: str, loss: Any) -> dict[str, torch.Tensor]:
    """What a loss remembers before the first micro-batch."""
    state = loss.init_state()
    check_state(name, "init_state", state)
    return state


def _forms(state: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    """Shape and dtype by name, in the order of the names."""
    return {key: (tuple(state[key].shape), state[key].dtype) for key in sorted(state)}


def check_reads(losses: Mapping[str, Any], groups: bool) -> None:
    """Raise a `ValueError` for losses that read what batches of pairs, or of `groups`, do not hold."""
    for name, loss in losses.items():
        whole = groups and loss.takes_groups
        if not loss.takes_pairs and not whole:
            behaviour = (
                ", `behaviour_logps` (each with one entry per completion)" if "behaviour_logps" in loss.reads else ""
            )
            raise ValueError(
                f'The loss {name!r} learns from whole groups of completions alone, and it was given pairs. Set `pairing="group"`; '
                f"offline, give the data as groups: the columns `prompt`, `completions`, `scores`{behaviour}."
            )
        if "behaviour_logps" in loss.reads and not whole:
            raise ValueError(
                f"The loss {name!r} reads log-probs under the policy that sampled the completions, which whole groups have and "
                'pairs have not. Set `pairing="group"`; offline, give the data as groups with a column `behaviour_logps`.'
            )
        if "teachers" in loss.reads and getattr(type(loss), "per_token", Loss.per_token) is Loss.per_token:
            raise ValueError(
                f"The loss {name!r} reads teachers and does not say what it makes of a token: define its method `per_token(logits, "
                "teacher_logits, reverse_logits)`."
            )
        if "token_logps" in loss.reads and whole:
            raise ValueError(
                f"The loss {name!r} reads log-probs of tokens, which pairs have and whole groups have not. Set "
                '`pairing="best_worst"`.'
            )


def _of_pairs(batch: PreferenceBatch) -> dict[str, torch.Tensor]:
    """What is logged of each pair, whatever the loss; NaN where a row has no traced pair."""
    metrics = {"lengths/chosen": batch.chosen_lengths, "lengths/rejected": batch.rejected_lengths}
    if batch.ref_chosen_logps is not None:
        metrics |= {"logratios/chosen": batch.chosen_logratios, "logratios/rejected": batch.rejected_logratios}
    if batch.empty_trace is not None:
        there = present(batch)
        metrics = {name: value.float().masked_fill(~there, torch.nan) for name, value in metrics.items()}
    if WEIGHT in batch.columns:
        metrics["pair_weight/mean"] = batch.columns[WEIGHT]
    return metrics
