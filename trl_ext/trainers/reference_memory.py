"""Log-probabilities under a reference that stands still: computed when a row is first met, and kept for the next time."""

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback

from trl_ext.data.cache import computing_config, content_key, tensor_key
from trl_ext.data.collator import KEY_BYTES
from trl_ext.logprobs import completion_lengths, scored_tokens, sum_completions
from trl_ext.logprobs.sharing import largest_dropout
from trl_ext.rows import Rows
from trl_ext.trainers.reference import ADAPTER, SyncReferenceAdapter
from trl_ext.trainers.self_check import is_sharded
from trl_ext.trainers.trl_seam import base_model


logger = get_logger(__name__)

# In a checkpoint, of each process
FILE = "reference_memory_{}.safetensors"
MEMORY_MB = 1024

# What a row takes on the host: its key, its number and their place in a dict, measured
ROW_BYTES = 200
# The buffer of the values grows by a quarter
SPARE = 1.25

# Callbacks that move a reference, by whomever they were added
FOLLOWING = (SyncRefModelCallback, SyncReferenceAdapter)


class Store:
    """
    Values by key, one or more for each, in the order in which they came.

    Args:
        limit (`float`):
            Bytes that they may take.
        device (`torch.device`):
            Where the values lie.
    """

    def __init__(self, limit: float, device: torch.device):
        self.limit, self.device = limit, device
        self.rows: dict[bytes, int] = {}
        self.ends = array("q", [0])
        self.values = torch.empty(0)
        self.bytes, self.full = 0.0, False

    def recall(self, keys: Sequence[bytes]) -> torch.Tensor | None:
        """The values of all keys, one after the other; `None` where one is not known."""
        rows = [self.rows.get(key, -1) for key in keys]
        return None if -1 in rows else torch.cat([self.values[self.ends[row] : self.ends[row + 1]] for row in rows])

    def keep(self, keys: Sequence[bytes], lengths: Sequence[int], values: torch.Tensor) -> None:
        """Keep what is new, as long as there is room: `lengths[i]` of the `values` belong to `keys[i]`."""
        new: list[torch.Tensor] = []
        for key, length, part in zip(keys, lengths, values.to(self.device).split(list(lengths)), strict=True):
            if key in self.rows:
                continue
            needed = ROW_BYTES + SPARE * length * values.element_size()
            if self.bytes + needed > self.limit:
                self.full = True
                break
            self.bytes += needed
            self.rows[key] = len(self.rows)
            self.ends.append(self.ends[-1] + length)
            new.append(part)
        if new:
            self._append(torch.cat(new))

    def _append(self, values: torch.Tensor) -> None:
        end = self.ends[-1]
        start = end - len(values)
        if end > len(self.values):
            grown = values.new_empty(int(SPARE * end))
            grown[:start] = self.values[:start]
            self.values = grown
        self.values[start:end] = values

    def since(self, row: int) -> dict[str, torch.Tensor]:
        """What came from a row on, as tensors on the host."""
        keys = np.frombuffer(b"".join(list(self.rows)[row:]), dtype=np.uint8)
        return {
            "keys": torch.from_numpy(keys.copy()).view(-1, KEY_BYTES),
            "lengths": torch.tensor(self.ends[row:]).diff(),
            "values": self.values[self.ends[row] : self.ends[-1]].cpu(),
        }

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep what [`since`] gave; tensors that are no such thing are a `ValueError`."""
        keys, lengths, values = (tensors[name] for name in ("keys", "lengths", "values"))
        if keys.shape != (len(lengths), KEY_BYTES) or lengths.sum() != len(values):
            raise ValueError(
                f"{len(keys)} keys, {len(lengths)} lengths and {len(values)} values do not belong together."
            )
        if (lengths < 0).any() or not values.isfinite().all():
            raise ValueError("It holds lengths below 0, or values that are not finite.")
        joined = keys.numpy().tobytes()
        keys = [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]
        self.keep(keys, lengths.tolist(), values)


class ReferenceMemory(TrainerCallback):
    """
    The reference's log-probabilities in a run of [`DPOTrainer`]: a row is scored when it is first met, then remembered.

    Rows are told apart by their content (token ids, and which are scored), so that epochs, repeated evaluations and streams find
    them again. Sums over completions are kept on the device, log-probabilities of tokens, where a loss reads them, on the host. The
    weights and settings of the reference are looked at before each training and evaluation, and where its parameters are
    others or were written to; what is remembered of another reference is forgotten.

    Args:
        trainer ([`DPOTrainer`]):
            Whose reference is asked.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        args, terms = trainer.args, trainer._terms
        self.limit = 2**20 * getattr(args, "ref_logps_memory_mb", MEMORY_MB)
        theirs = trainer._scorer.head is None and not terms.losses  # a run of TRL's own, to the last bit
        spared = trainer._needs_reference and not (args.sync_ref_model or trainer.precompute_ref_logps or theirs)
        self.on = bool(self.limit and spared)
        self.of_tokens = "token_logps" in terms.reads
        self._model, self._stamp = None, None
        self._fixed = self._sharded = self._said = False
        self._forget(None)

    def _forget(self, reference: str | None) -> None:
        """Begin anew, with values of another reference."""
        self._reference, self._shared = reference, 0
        self.store = Store(self.limit, torch.device("cpu") if self.of_tokens else self.trainer.args.device)

    # In a step

    def logps(
        self, model: torch.nn.Module, rows: Rows, forward: Callable[[], torch.Tensor]
    ) -> tuple[Rows, torch.Tensor | None]:
        """
        The rows, with the reference's log-probabilities of completions where these are all that is read; and those of tokens where
        they are not.

        Args:
            model (`torch.nn.Module`):
                The reference, or the policy where that is run as the reference.
            rows ([`~trl_ext.rows.Rows`]):
                `N` rows.
            forward (`Callable`):
                Runs the reference: log-probabilities of tokens `(N, T')`.
        """
        if not self.on or not self._stands_still(model):
            return rows, forward()
        known = None if rows.keys is None else self.store.recall(rows.keys)
        if not self._in_every_process(known is not None):
            return self._computed(rows, forward())
        if not self.of_tokens:
            return dataclasses.replace(rows, ref_logps=known), None
        mask = rows.completion_mask[:, 1:] != 0
        known = known.to(mask.device, non_blocking=True)
        return rows, known.new_zeros(mask.shape).masked_scatter(mask, known)

    def _computed(self, rows: Rows, token_logps: torch.Tensor) -> tuple[Rows, torch.Tensor | None]:
        if rows.keys is None:
            return rows, token_logps
        if self.of_tokens:
            values, mask = scored_tokens(token_logps, rows.completion_mask)
            self._keep(rows.keys, completion_lengths(rows.completion_mask).tolist(), values[mask != 0])
            return rows, token_logps
        sums = sum_completions(token_logps, rows.completion_mask, self.trainer.ld_alpha, rows.partner)
        self._keep(rows.keys, [1] * len(sums), sums)
        return dataclasses.replace(rows, ref_logps=sums), None

    def _keep(self, *found: Any) -> None:
        self.store.keep(*found)
        self._say_if_full()

    def _say_if_full(self) -> None:
        if self.store.full and not self._said:
            self._said = True
            logger.warning(
                f"Reference log-probabilities of {len(self.store.rows)} completions are kept, for which `ref_logps_memory_mb="
                f"{self.limit / 2**20:g}` has room. Those of further ones are computed each time; raise it to spare that."
            )

    def _in_every_process(self, known: bool) -> bool:
        """Where each process has a part of the reference, all of them run it or none does."""
        if not self._sharded:
            return known
        flag = torch.tensor(float(known), device=self.trainer.args.device)
        accelerator = self.trainer.accelerator
        return bool(accelerator.reduce(flag, reduction="sum").item() == accelerator.num_processes)

    # Whose values they are

    def before_training(self, resume_from_checkpoint: str | None) -> None:
        """Go on with what a checkpoint remembers; without one, with what is remembered here."""
        self.before_evaluation()
        if self.on and resume_from_checkpoint:
            self.load(resume_from_checkpoint)

    def before_evaluation(self) -> None:
        """Look at the reference again before the next batch."""
        self._stamp = None

    def _stands_still(self, model: torch.nn.Module) -> bool:
        """Whether values of the reference hold later too. What was kept of another one is forgotten."""
        if model is self._model and self._versions(model) == self._stamp:
            return self._fixed
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what the last forward has left whole is no longer this process's part
        self._model, self._stamp, self._sharded = model, self._versions(model), is_sharded(model)
        parameters = dict(self._of_reference(model, torch.nn.Module.named_parameters))
        fingerprint = None if self._moves(model, parameters) else self._fingerprint(model, parameters)
        self._fixed = fingerprint is not None
        if fingerprint != self._reference:
            if self.store.rows:
                logger.info("The reference, or how it is run, has changed: its log-probabilities are computed anew.")
            self._forget(fingerprint)
        return self._fixed

    def _versions(self, model: torch.nn.Module) -> list[int]:
        """Of each parameter a number that moves when it is written to, and not when it is gathered; read without waiting for the device."""
        return [value._version for _, value in self._of_reference(model, torch.nn.Module.named_parameters)]

    def _of_reference(self, model: torch.nn.Module, named: Callable[[torch.nn.Module], Iterable]) -> Iterable[tuple]:
        """Its parameters, or modules, by name: not the adapter that is trained, where it is the policy without that."""
        model = self.trainer.accelerator.unwrap_model(model)
        trained = model.active_adapters if self.trainer.ref_model is None and isinstance(model, PeftModel) else []
        return (
            (name, value) for name, value in named(model) if not any(f".{each}." in f"{name}." for each in trained)
        )

    def _moves(self, model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter]) -> bool:
        """Whether the reference is trained, follows the policy, or says another thing each time."""
        trainer = self.trainer
        trained = {id(value) for value in trainer.model.parameters() if value.requires_grad}
        modules = [module for _, module in self._of_reference(model, torch.nn.Module.named_modules)]
        return (
            any(id(value) in trained for value in parameters.values())
            or any(isinstance(each, FOLLOWING) for each in trainer.callback_handler.callbacks)
            or ((trainer.ref_model is None or model.training) and largest_dropout(modules) > 0)
        )

    def _fingerprint(self, model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter]) -> str | None:
        """Of weights (of this process's part of them) and settings; `None` where the weights cannot be read."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(model)
        try:
            weights = {name: tensor_key(value) for name, value in parameters.items()}
        except (KeyError, NotImplementedError, RuntimeError, TypeError) as error:  # elsewhere, or of an unusual kind
            logger.warning_once(
                f"Reference log-probabilities are not kept: the weights of the reference cannot be read ({error})."
            )
            return None
        adapters = getattr(model, "peft_config", {})
        adapter = adapters[ADAPTER].to_dict() if ADAPTER in adapters else None
        head, args = trainer._scorer.head, trainer.args
        settings = (args.bf16, args.fp16, trainer.ld_alpha, head and head.backend, self.of_tokens)
        return content_key(weights, computing_config(base_model(model)), adapter, settings)

    # Several processes, and checkpoints

    def on_epoch_end(self, args, state, control, **kwargs):
        """What a process has met in this epoch, another one meets in the next."""
        if self.trainer.accelerator.num_processes == 1 or control.should_training_stop:
            return
        for found in gather_object([self.store.since(self._shared)]):
            self.store.take(found)
        self._shared = len(self.store.rows)
        self._say_if_full()

    def save(self, folder: str | Path) -> None:
        """Write what this process remembers into a checkpoint."""
        if self.store.rows:
            path = Path(folder) / FILE.format(self.trainer.args.process_index)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = self.store.since(0)
            save_file(tensors, path, {"reference": self._reference, "checksum": _checksum(tensors)})

    def load(self, folder: str | Path) -> None:
        """Remember what [`save`] wrote. Of a checkpoint without it nothing is remembered; nor, with a warning, where it is damaged."""
        self._forget(None)
        path = Path(folder) / FILE.format(self.trainer.args.process_index)
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in ("keys", "lengths", "values")}
            if about.get("checksum", _checksum(tensors)) != _checksum(tensors):  # an older version wrote none
                raise ValueError("it was changed since it was written")
            reference = about["reference"]
            self.store.take(tensors)
            self._reference = reference
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            self._forget(None)
            logger.warning(
                f"{path} cannot be read ({error}): the reference's log-probabilities are computed anew.",
                main_process_only=False,
            )


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    return content_key({name: tensor_key(value) for name, value in tensors.items()})
