"""Work that survives a killed process: results on disk by what they were computed from."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState


def default_folder() -> Path:
    """`$TRL_EXT_CACHE`, else `~/.cache/trl_ext`."""
    return Path(os.environ.get("TRL_EXT_CACHE") or Path.home() / ".cache" / "trl_ext")


def content_key(*parts: Any) -> str:
    """A short hash of anything that JSON can write."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def write_atomically(path: Path, text: str) -> None:
    """The whole file or none of it, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class Ledger:
    """
    A file of results, one JSON line each, that is only ever appended to.

    Args:
        folder (`Path`):
            Where the files of all processes lie.
        name (`str`):
            What the results were computed with.
        writer (`str`, *optional*, defaults to `"0"`):
            Who writes: each process has a file of its own and reads all.
    """

    def __init__(self, folder: Path, name: str, writer: str = "0"):
        self.folder, self.name = Path(folder), name
        self.path = self.folder / f"{name}-{writer}.jsonl"

    def read(self) -> dict[str, Any]:
        """All results by key. A line that a killed process left unfinished is passed over."""
        return dict(self._lines())

    def _lines(self) -> Iterator[tuple[str, Any]]:
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            for line in path.read_text().split("\n"):
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                yield key, value

    def append(self, results: dict[str, Any]) -> None:
        """Write results, on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps([key, value]) + "\n" for key, value in results.items())
        # The line that a killed process left must not swallow the next one
        torn = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a") as file:
            file.write(("\n" if torn else "") + lines)
            file.flush()
            os.fsync(file.fileno())


def processes() -> PartialState:
    """This process among those of the run: `accelerate`'s state, on CPUs too, where it has to be told."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=True) if several and not torch.cuda.is_available() else PartialState()
