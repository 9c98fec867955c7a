"""Trainings in processes: each is done once and written at once; one that fails, or whose process dies, does not take others along."""

import concurrent.futures
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm


Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """
    A call in another process.

    Args:
        name (`str`): As the progress has it, and no other job's.
        call (`Callable`): A function of a module, which gives a result that JSON can hold.
        arguments (`tuple`): Of the call.
    """

    name: str
    call: Callable[..., Result]
    arguments: tuple


def run_all(
    todo: Callable[[], list[Job]],
    write: Callable[[Job, Result], None],
    left: Callable[[], int],
    folder: Path,
    workers: int,
    minutes: float,
) -> int:
    """
    Does the jobs that have no result yet.

    Args:
        todo (`Callable`): Those that could be done now, first ones first. Asked again after each result.
        write (`Callable`): Keeps a result; an error is one too, `{"error": ...}`.
        left (`Callable`): How many have no result, those included that cannot be done yet.
        folder (`Path`): For the log of the processes.
        workers (`int`): Processes.
        minutes (`float`): After these no job is begun.

    Returns:
        `int`: How many are left, where time ran out.
    """
    if not todo():
        return left()
    began, progress = time.monotonic(), Progress(left)
    flying: dict[concurrent.futures.Future, Job] = {}
    deaths: dict[str, int] = {}
    pool = make_pool(folder, workers)
    try:
        while True:
            names = {job.name for job in flying.values()}
            waiting = [job for job in todo() if job.name not in names]
            broken = False
            while waiting and len(flying) < workers and time.monotonic() - began < 60 * minutes and not broken:
                job = waiting.pop(0)
                try:
                    flying[pool.submit(attempt, job.call, *job.arguments)] = job
                except BrokenProcessPool:
                    if not flying:  # no job has done it
                        raise
                    broken = True  # what is in the air will say so
            if not flying:
                return left()
            finished, _ = concurrent.futures.wait(flying, return_when=concurrent.futures.FIRST_COMPLETED)
            broken = False
            for future in finished:
                job = flying.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    broken, result = True, died(job, deaths)
                if result is not None:
                    write(job, result)
                    progress.step(job.name, "error" in result)
            if broken:
                # What else was in the air died too; alone in its pool, the next one to die is the one to blame
                for job in flying.values():
                    died(job, deaths)
                flying.clear()
                pool.shutdown(wait=False)
                workers = 1
                pool = make_pool(folder, workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        progress.close()


def died(job: Job, deaths: dict[str, int]) -> Result | None:
    """Counts a death; a job that has died twice, the second time alone, is one that failed."""
    deaths[job.name] = deaths.get(job.name, 0) + 1
    return {"error": "its process died twice"} if deaths[job.name] > 1 else None


class Progress:
    """
    A bar in a terminal; elsewhere a line every half minute.

    Args:
        left (`Callable`): How many jobs have no result yet.
        every (`float`, *optional*, defaults to `30.0`): Seconds between lines.
    """

    def __init__(self, left: Callable[[], int], every: float = 30.0):
        self.left, self.every, self.done, self.failed = left, every, 0, 0
        self.began = self.said = time.monotonic()
        self.bar = tqdm(total=left(), unit="run") if sys.stderr.isatty() else None

    def step(self, name: str, failed: bool) -> None:
        self.done, self.failed, left = self.done + 1, self.failed + failed, self.left()
        if self.bar is not None:
            self.bar.total = self.done + left
            self.bar.set_description(name + (f" ({self.failed} failed)" if self.failed else ""))
            self.bar.update()
        elif time.monotonic() - self.said >= self.every or not left:
            self.said = time.monotonic()
            minutes = (self.said - self.began) / self.done * left / 60
            print(
                f"{self.done} of {self.done + left} runs, {self.failed} failed, about {minutes:.0f} min left ({name})",
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def make_pool(folder: Path, workers: int) -> concurrent.futures.Executor:
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer=begin, initargs=(folder / "log.txt",))


# The worker's side


def begin(log: Path) -> None:
    """What libraries say goes into a file: it would tear the progress apart."""
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """No worker goes on alone after the command was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def attempt(call: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a call, its seconds on the wall and of the processor; an error is a result too."""
    began, used = time.monotonic(), time.process_time()
    try:
        result = call(*arguments)
    except Exception as error:
        traceback.print_exc()
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    seconds = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - used}
    return {**result, **{name: round(value, 1) for name, value in seconds.items()}}
