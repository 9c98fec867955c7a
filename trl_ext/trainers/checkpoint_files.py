"""Whether the files of a checkpoint can be read, looked at before a run is resumed from it."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open

from trl_ext.reading import read_json, read_text


logger = get_logger(__name__)

STATE = "trainer_state.json"
JSONS = (STATE, "config.json", "losses.json")
# What `torch.save` writes: archives, of which a half-written one has no end
ARCHIVES = ("*.pt", "rng_state*.pth")
# Log-probs that are computed anew where they cannot be read
OPTIONAL = "reference_memory_"


def check_checkpoint(folder: str | Path) -> None:
    """
    Raise a `ValueError` for a checkpoint that is not there, or of which a file was cut off while it was written or is something else.

    Args:
        folder (`str` or `Path`):
            What a run is resumed from.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"There is no checkpoint {str(folder)!r} to resume from; the working folder is {str(Path.cwd())!r}."
        )
    if not (folder / STATE).is_file():
        raise ValueError(f"The folder {str(folder)!r} is no checkpoint to resume from: it has no {STATE}.")
    for path, problem in unreadable(folder):
        raise ValueError(
            f"The file {str(path)!r} cannot be read: {problem}. It may have been cut off while it was written: resume from another "
            "checkpoint."
        )
    if not any(folder.glob("optimizer*")) and not any(folder.glob("global_step*")):
        logger.warning(
            f"The checkpoint {str(folder)!r} holds no state of the optimizer, which begins anew: the resumed run is not the one that was "
            "interrupted."
        )


def unreadable(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of a checkpoint that cannot be read, and why."""
    for name in JSONS:
        path = folder / name
        if path.is_file():
            try:
                value = read_json(read_text(path))
            except ValueError as error:
                yield path, str(error).removesuffix(".")
                continue
            if not isinstance(value, dict):
                yield path, f"it holds {value!r:.60}, not names with values"
            elif name == STATE and (type(value.get("global_step")) is not int or value["global_step"] < 0):
                yield path, f"its `global_step` is {value.get('global_step')!r:.60}, not a number of steps"
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith(OPTIONAL):
            try:
                with safe_open(path, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                yield path, str(error)
    for path in (each for name in ARCHIVES for each in sorted(folder.glob(name))):
        if path.is_file() and not zipfile.is_zipfile(path):
            yield path, "it is no whole archive"
