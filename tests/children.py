"""Work in forked processes, which can be killed: what was imported once need not be imported by each."""

import contextlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


SECONDS = 120  # what a run may take before it counts as hanging


def start(work: Callable[[], None], log: Path) -> int:
    """Do `work` in a process of its own, which writes into a log; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell leaves out where the tests run in the background
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code)
    except BaseException:
        with contextlib.suppress(OSError):  # of a full disk
            traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int, kill_after: float | None = None, number: int = signal.SIGKILL) -> int:
    """Wait for a process and return how it ended: its exit status, or minus the signal. It may be killed after some seconds."""
    began = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if kill_after is not None and passed >= kill_after:
            os.kill(pid, number)
            kill_after = None
        if passed > SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"The run hung: it had not ended after {SECONDS} seconds.")
        time.sleep(0.002)


def run(work: Callable[[], None], log: Path, **kill) -> int:
    """Do `work` in a process of its own and return how it ended."""
    return ended(start(work, log), **kill)


def script(path: Path, arguments: list, log: Path) -> int:
    """Do what `python path arguments` does in a process of its own and return how it ended."""

    def work() -> None:
        sys.argv = [str(path), *map(str, arguments)]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    return run(work, log)
