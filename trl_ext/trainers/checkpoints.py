"""Checkpoints that are whole or are not resumed from: a run may be killed, or the disk be full, while one is written."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from trl_ext.data.cache import checksum, write_atomically
from trl_ext.trainers.checkpoint_files import STATE, check_checkpoint, unreadable


logger = logging.getLogger(__name__)

# Sizes and checksums of what a run is resumed with
CONTENTS = "trl_ext_contents.json"
BEING_WRITTEN = "null"
TOKENS_FILE = "num_tokens.json"
OURS = (
    TOKENS_FILE,
    "losses.json",
    "loss_state.safetensors",
    "bias_variance_mixing.json",
    "block_*.json",
    "ref_model.safetensors",
)
# Of transformers, FSDP and DeepSpeed
THEIRS = (
    STATE,
    "model*.safetensors",
    "adapter_model.*",
    "*.index.json",
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_*/*",
    "optimizer_*/*",
    "global_step*/*",
    "latest",
)
# What the reference has said is not among them: it says by itself whether it is whole, and is computed anew.
# Bytes from which on the size alone of a file of theirs is compared: a checksum takes as long as reading the file
LARGE = 2**33


class WholeCheckpoints:
    """Put in front of a trainer: a checkpoint counts once it is finished, and is resumed from only if it is whole."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        checkpoint, refusal = None, None
        try:
            checkpoint = whole_checkpoint(self.args.output_dir, resume_from_checkpoint)
        except ValueError as error:
            refusal = str(error)
        # All processes refuse, or none does: one that went on would wait for the others
        for text in filter(None, gather_object([refusal])):
            raise ValueError(text)
        self._before_training(checkpoint)
        if checkpoint is not None:
            _load_first_of_several_adapters(self, checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def _before_training(self, checkpoint: str | None) -> None:
        """What a trainer does before training begins or, from a checkpoint, goes on."""

    def _save_own(self, folder: Path) -> None:
        """Write what a checkpoint has beside TRL's files. Called in every process."""

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                _begin(folder)
            self.accelerator.wait_for_everyone()
            # First: to others a checkpoint is finished with transformers' last file
            self._save_own(folder)
            self.accelerator.wait_for_everyone()
            with self._keeping_older_ones():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_atomically(folder / CONTENTS, json.dumps(_contents(folder), indent=2) + "\n")
                # Only now: killed before, a run would have neither the older ones nor this one
                limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
                rotate_checkpoints(str(folder.parent), limit, best_model_checkpoint=best, use_mtime=True)
        except Exception as error:
            if not _of_the_disk(error):
                raise
            last = last_whole(folder.parent)
            way_out = f"resume from {last}" if last else "start anew: no checkpoint was finished"
            raise OSError(
                f"The checkpoint {folder} cannot be written ({error}), and training stops at step {self.state.global_step}. Make room, or "
                f"mend what is in the way, and {way_out}."
            ) from error

    @contextlib.contextmanager
    def _keeping_older_ones(self) -> Iterator[None]:
        """While open, transformers removes no older checkpoint. Its `training_args.bin`, which nothing reads, has no limit then."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit


def _load_first_of_several_adapters(trainer: Any, checkpoint: str) -> None:
    """What transformers before 5.23 leaves as it is: where a reference lies beside the adapter, it loads the reference's alone."""
    model, sharded = trainer.model, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    there = any((Path(checkpoint) / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if there and not sharded and is_peft_model(model) and {"default"} < {*model.peft_config}:
        active = model.active_adapter
        model.load_adapter(checkpoint, "default", is_trainable=active == "default")
        model.set_adapter(active)


def _of_the_disk(error: Exception) -> bool:
    """Whether a file could not be written: for Python, safetensors or torch."""
    hub = isinstance(error, OSError) and error.errno is None
    torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return (isinstance(error, (OSError, SafetensorError)) and not hub) or torch


def _begin(folder: Path) -> None:
    """A place for a checkpoint. An earlier run may have left one there, which must not look whole when it is half overwritten."""
    write_atomically(folder / CONTENTS, f"{BEING_WRITTEN}\n")
    for path in _resumed_with(folder):
        path.unlink(missing_ok=True)


def _resumed_with(folder: Path) -> list[Path]:
    return [path for name in (*THEIRS, *OURS) for path in sorted(folder.glob(name)) if path.is_file()]


def _contents(folder: Path) -> dict[str, Any]:
    """Size and checksum of the files that a run is resumed with, by name."""
    contents = {}
    for path in _resumed_with(folder):
        size = path.stat().st_size
        whole = size <= LARGE or any(path.match(name) for name in OURS)
        contents[path.relative_to(folder).as_posix()] = [size, checksum(path) if whole else None]
    return contents


def whole_checkpoint(output_dir: str, given: str | bool | None) -> str | None:
    """
    What a run is resumed from: the given checkpoint, or with `True` the last of `output_dir` that is whole.

    Raises:
        `ValueError`: If the given one, or each one, is damaged or was not finished, and for a folder that is none.
    """
    words = {"true": True, "false": False}
    if isinstance(given, str) and not Path(given).is_dir():  # on the command line the option is text
        given = words.get(given.lower(), given)
    if not given:
        return None
    if given is True:
        given = last_whole(output_dir, warn=True)
        if given is None:
            raise ValueError(
                f"There is no whole checkpoint in {output_dir}: start anew, without `resume_from_checkpoint`."
            )
    elif Path(given).is_dir():
        found = problem(Path(given))
        if found is not None:
            last = last_whole(Path(given).parent)
            advice = f"Resume from {last}" if last else "No other one is whole: start anew, without it"
            raise ValueError(f"{found} {advice}.")
    check_checkpoint(given)
    return given


def last_whole(folder: str | Path, warn: bool = False) -> str | None:
    """The last checkpoint in a folder that is whole; with `warn`, those after it are named."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*/")}
    for path in sorted(filter(steps.get, steps), key=lambda path: -int(steps[path][1])):
        found = problem(path)
        if found is None:
            return str(path)
        if warn and PartialState().is_main_process:
            logger.warning(f"{found} It is passed over.")
    return None


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as a sentence; `None` where nothing is."""
    if not (checkpoint / STATE).exists():
        return f"The checkpoint {checkpoint} was not finished: it has no {STATE}."
    if (checkpoint / CONTENTS).exists() and (checkpoint / CONTENTS).read_bytes().strip() == BEING_WRITTEN.encode():
        return f"The checkpoint {checkpoint} was not finished: a process had not yet written its part."
    for name in _damaged(checkpoint):
        return (
            f"The checkpoint {checkpoint} is damaged: {name} was cut off, changed or removed since it was written. {CONTENTS} says how large "
            "files were, and their checksums: remove it where the change is meant."
        )
    for path, reason in unreadable(checkpoint):
        return f"The checkpoint {checkpoint} is damaged: {path.name} was cut off or changed, and cannot be read ({reason})."
    return None


def _damaged(checkpoint: Path) -> Iterator[str]:
    """Names of files that are not what was written, by the list that lies beside them; of TRL's own trainer there is none."""
    listed = _read(checkpoint / CONTENTS) if (checkpoint / CONTENTS).exists() else {}
    if listed is None:
        yield CONTENTS
    for name, (size, kept) in (listed or {}).items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size or (kept is not None and checksum(path) != kept):
            yield name


def _read(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; `None` where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None
