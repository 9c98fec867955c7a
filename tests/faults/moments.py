"""Moments of a run, by what it does to its folder and to its weights; in one of them the run may kill itself, or find the disk full."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def note(moment: str) -> None:
    """Name a moment that is no file, from inside a run."""
    sys.audit("tests.faults", moment)


class Moments:
    """
    Watches the process it is made in, for good: make it in one that ends with the run.

    Args:
        folder (`Path`):
            Of the run; other files are not looked at.
        record (`Path`, *optional*):
            Where each moment is written to, one in a line.
        at (`int`, *optional*):
            The number of the moment at which it happens.
        matching (`str`, *optional*):
            A regular expression: it happens at the first of the moments that match.
        what (`str`, *optional*, defaults to `"kill"`):
            `"kill"` before the moment; `"tear"` when half of the file is written, where it is one; `"full"`: no file can be written
            from then on.
        number (`int`, *optional*, defaults to `SIGKILL`):
            The signal.
    """

    def __init__(self, folder, record=None, at=None, matching=None, what="kill", number=signal.SIGKILL):
        self.folder, self.at, self.what, self.number = str(folder), at, what, number
        self.matching = re.compile(matching) if matching else None
        self.count, self.full, self.busy = 0, False, False
        self.record = None if record is None else os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        register_optimizer_step_pre_hook(lambda *_: self._moment("step"))
        register_optimizer_step_post_hook(lambda *_: self._moment("stepped"))
        self._wrap(torch, "save", 1)
        self._wrap(safetensors.torch, "serialize_file", 1)
        sys.addaudithook(self._audit)

    def _wrap(self, module, name: str, place: int) -> None:
        """A writer that Python does not see at work."""
        original = getattr(module, name)

        def writes(*args, **kwargs):
            path = args[place] if len(args) > place else kwargs.get("filename", kwargs.get("f"))
            if isinstance(path, (str, Path)) and str(path).startswith(self.folder):
                self._moment("write", str(path), lambda: original(*args, **kwargs))
            return original(*args, **kwargs)

        setattr(module, name, writes)

    def _audit(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], (str, Path)) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self._moment("write", str(args[0]))
        elif event == "tests.faults":
            self._moment(args[0])
        elif event in ("os.rename", "os.remove", "os.mkdir"):
            self._moment(event.removeprefix("os."), str(args[1] if event == "os.rename" else args[0]))

    def _moment(self, what: str, path: str | None = None, write: Callable[[], None] | None = None) -> None:
        if self.busy or (path is not None and not path.startswith(self.folder)):
            return
        self.busy = True
        try:
            name = "" if path is None else " " + os.path.relpath(path, self.folder)
            name = what + re.sub(r"[0-9a-f]{12,}", "*", name)
            if self.record is not None:
                os.write(self.record, f"{name}\n".encode())
            now = self.count == self.at or bool(self.matching and self.matching.search(name))
            self.count += 1
            if now and self.what == "full":
                self.full = True
            if self.full and what == "write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if now and self.what == "tear" and what == "write":
                _tear(path, write)
            if now and self.what in ("kill", "tear"):
                os.kill(os.getpid(), self.number)
        finally:
            self.busy = False


def _tear(path: str, write: Callable[[], None] | None) -> None:
    """Half of a file, as a kill leaves it."""
    if write is not None:
        write()
        os.truncate(path, os.path.getsize(path) // 2)
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, b'["half of a line')
    os.close(file)
