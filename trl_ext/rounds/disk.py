"""A run on disk: which settings it belongs to, which stages are begun, and which are done."""

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, load_from_disk

from trl_ext.data.cache import checksum, processes, write_atomically
from trl_ext.reading import read_json, read_text


logger = get_logger(__name__)


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder that of these settings; one that other settings have filled is a `ValueError`."""
    state = processes()
    path = folder / "settings.json"
    text = json.dumps(settings, indent=2, sort_keys=True, default=_lasting) + "\n"
    before = _settings(path) if path.exists() else text
    if before != text:
        old = read_json(before)
        changed = sorted(name for name in settings if json.loads(text).get(name) != old.get(name))
        raise ValueError(
            f"{folder} holds rounds with other settings: {changed} differ. Choose another `output_dir`, remove that "
            "folder, or restore the settings. More `rounds` can be added any time."
        )
    state.wait_for_everyone()
    if state.is_main_process:
        write_atomically(path, text)


def _settings(path: Path) -> str:
    """The text of the settings of earlier rounds."""
    try:
        text = read_text(path)
        if not isinstance(read_json(text), dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({error}), so that nobody can say which settings the rounds in {path.parent} have. Choose another "
            "`output_dir`, or remove that folder."
        ) from error
    return text


def _lasting(value: Any) -> str:
    """What settings hold beside text and numbers, by a name that is the same in the next run."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def stage(target: Path, work: Callable[[], None], beside: Sequence[str] = ()) -> None:
    """
    Do `work`, which fills `target`, unless that is done. What a killed run left there half-finished is removed first.

    Beside the folder stand two files: `<name>.begun`, empty, from before the first byte of it, and `<name>.done`, with the checksum of
    each file of it, and of those that lie `beside` it.

    Raises:
        `ValueError`: If the folder is there and no run of rounds has begun it, or if what is done is no longer whole.
    """
    done, begun = (target.with_name(f"{target.name}.{mark}") for mark in ("done", "begun"))
    state = processes()
    if done.exists():
        _refuse_damaged(target, done)
        return
    state.wait_for_everyone()
    if target.exists() and not begun.exists():
        raise ValueError(
            f"{target} is in the way: it was not made by these rounds. Choose another `output_dir`, or move that away."
        )
    state.wait_for_everyone()
    if state.is_main_process:
        if target.exists():
            shutil.rmtree(target)
        write_atomically(begun, "")
    state.wait_for_everyone()
    logger.info(f"{target.parent.name}: {target.name}", main_process_only=True)
    work()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    state.wait_for_everyone()
    if state.is_main_process:
        files = [*(path for path in sorted(target.rglob("*")) if path.is_file()), *map(target.with_name, beside)]
        sums = {path.relative_to(target.parent).as_posix(): checksum(path) for path in files}
        write_atomically(done, json.dumps(sums, indent=2) + "\n")
    state.wait_for_everyone()


def _refuse_damaged(target: Path, done: Path) -> None:
    """Raise a `ValueError`, in all processes, where a file of what is done was cut off, changed or removed."""
    problem = [None]
    if processes().is_main_process:
        try:
            sums = json.loads(done.read_text() or "{}")  # empty: of an older version
            paths = {name: target.parent / name for name in sums}
            problem = [name for name, path in paths.items() if not path.is_file() or checksum(path) != sums[name]][:1]
        except ValueError:
            problem = [done.name]
    (name,) = broadcast_object_list(problem or [None])
    if name is not None:
        raise ValueError(
            f"{target.parent / name} is damaged: it was cut off, changed or removed since it was written. Remove {done} and start again: what "
            f"{target.name} holds is made anew, as it was."
        )


def dataset_stage(target: Path, make: Callable[[], Dataset], beside: Sequence[str] = ()) -> Dataset:
    """The dataset in `target`, which is made unless that is done; as in [`stage`]."""

    def work() -> None:
        dataset = make()
        if processes().is_main_process:
            dataset.save_to_disk(target)

    stage(target, work, beside)
    try:
        return load_from_disk(target)
    except Exception as error:  # each reader has its own
        raise ValueError(
            f"{target} is marked as done and cannot be read: {error}. Remove {target}.done to have it made anew."
        ) from error
