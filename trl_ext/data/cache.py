"""Work that survives a killed process: results on disk by what they were computed from."""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from trl.trainer.utils import hash_module

from trl_ext.data.keys import content_key
from trl_ext.reading import read_json


# Of a configuration: what changes nothing of what a model computes
_NAMES = ("_name_or_path", "architectures", "transformers_version", "use_cache")
# Numbers of a tensor that are hashed at a time, and what their bits are read as
_PART = 2**20
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def default_folder() -> Path:
    """`$TRL_EXT_CACHE`, else `~/.cache/trl_ext`."""
    return Path(os.environ.get("TRL_EXT_CACHE") or Path.home() / ".cache" / "trl_ext")


def content_seed(*parts: Any) -> int:
    """A seed of its own for anything that [`content_key`] takes."""
    return int(content_key(*parts), 16) % 2**31


def computing_config(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model as far as it says what is computed with the weights."""
    return {name: value for name, value in model.config.to_dict().items() if name not in _NAMES}


def model_key(model: nn.Module) -> str:
    """A hash of a model's weights, and of the configuration that says what is computed with them."""
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    active = model.active_adapters if adapters and hasattr(model, "get_base_model") else None
    return content_key(hash_module(model), computing_config(model), adapters, active)


def tensor_key(value: torch.Tensor) -> list:
    """Form and content of the part of a parameter that this process has: its bits under random factors, added up exactly."""
    local = getattr(value, "ds_tensor", value).detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    bits = local.reshape(-1).contiguous().view(_BITS[local.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (min(_PART, len(bits)),), generator=generator).to(local.device)
    sums = [(part.long() * (2 * factors[: len(part)] + 1)).sum() for part in bits.split(_PART)]
    return [str(local.dtype), list(value.shape), torch.stack(sums).tolist()]


def write_atomically(path: Path, text: str) -> None:
    """The whole file or none of it, whenever the process or the machine dies, or the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritten(error, path) from error


def _unwritten(error: OSError, path: Path) -> OSError:
    """The same error with the file, which one of a full disk does not name."""
    return type(error)(
        error.errno, f"{error.strerror}. What was finished before is on disk; make room and start again", str(path)
    )


def write_sealed(path: Path, value: Any) -> None:
    """Write what JSON can hold in one line, and a checksum in a second one, for [`read_sealed`]."""
    text = json.dumps(value)
    write_atomically(path, f"{text}\n{json.dumps(content_key(text))}\n")


def read_sealed(path: Path) -> Any:
    """
    What [`write_sealed`] wrote. A file of one line, without a checksum, is read as it is.

    Raises:
        `ValueError`: If the file was cut off or changed since it was written.
    """
    try:
        text, *seal = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        value = read_json(text)
        whole = not seal or seal == [json.dumps(content_key(text))]
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: it was cut off or changed since it was written.")
    return value


def checksum(path: Path) -> str:
    """Of the bytes of a file, against accidents: about as fast as it is read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


class Ledger:
    """
    Results in files of JSON lines that are only ever appended to.

    Each object writes a file of its own, so that processes and runs that share a folder never write into each other's lines.

    Args:
        folder (`Path`):
            Where the files of all processes and runs lie.
        name (`str`):
            What the results depend on, all of it: another name, other results.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = Path(folder), name
        self.path = self.folder / f"{name}-{uuid.uuid4().hex[:12]}.jsonl"

    def read(self) -> dict[str, float]:
        """All results by key. What a killed process left unfinished, and what is damaged or no result, is passed over."""
        return dict(self._lines())

    def _lines(self) -> Iterator[tuple[str, float]]:
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            for line in path.read_text(errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                # A line without a checksum is one of an older version
                result = isinstance(entry, list) and [type(part) for part in entry[:2]] == [str, float]
                if result and math.isfinite(entry[1]) and entry[2:] in ([], [content_key(*entry[:2])]):
                    yield entry[0], entry[1]

    def append(self, results: dict[str, float]) -> None:
        """Write results, on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.path, "a") as file:
                for key, value in results.items():
                    file.write(json.dumps([key, value, content_key(key, value)]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritten(error, self.path) from error


def processes() -> PartialState:
    """This process among those of the run: `accelerate`'s state, on CPUs too, where it has to be told."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=True) if several and not torch.cuda.is_available() else PartialState()
