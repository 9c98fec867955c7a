"""Runs in processes: each is done once and written at once; one that fails, or whose process dies, does not take others along."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trl_ext.data.cache import write_atomically

from .frame import Claim, Run, Scale
from .toy import TRAINING, build


@dataclass(frozen=True)
class Place:
    """Where runs of one size and one world lie."""

    folder: Path
    scale: Scale
    real: dict[str, Any] | None = None  # the arguments of a world of real size; the toy world otherwise

    def file(self, run: Run) -> Path:
        return self.folder / run.claim / f"{run.key}.json"

    def arguments(self, claim: Claim, run: Run) -> dict[str, Any]:
        """What a run depends on: where it changes, the run is done anew."""
        where = TRAINING if self.real is None else self.real
        shown = {"settings": claim.described(run), "scale": dataclasses.asdict(self.scale), "world": where}
        return json.loads(json.dumps(shown))

    def result(self, claim: Claim, run: Run) -> dict[str, Any] | None:
        """The result of a run, if it was done with these arguments."""
        file = self.file(run)
        found = json.loads(file.read_text()) if file.exists() else None
        return found if found and found["arguments"] == self.arguments(claim, run) else None

    def results(self, claim: Claim) -> list[dict[str, Any]]:
        return [result for run in claim.runs() if (result := self.result(claim, run)) is not None]

    def write(self, claim: Claim, run: Run, result: dict[str, Any]) -> None:
        file = self.file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        named = {**dataclasses.asdict(run), "arguments": self.arguments(claim, run), **result}
        write_atomically(file, json.dumps(named, indent=1) + "\n")


def run_all(claims: list[Claim], place: Place, workers: int, minutes: float, again: bool) -> int:
    """Does what is not done yet; returns how many runs are left, where time ran out."""
    todo = []
    for claim in claims:
        for run in claim.runs():
            done = place.result(claim, run)
            if done is None or (again and "error" in done):
                todo.append((claim, run))
    if not todo:
        return 0
    # Whole seeds of all claims: what is there when time runs out can be judged
    todo.sort(key=lambda each: each[1].seed)
    place.folder.mkdir(parents=True, exist_ok=True)
    began, progress, failed, deaths = time.monotonic(), Progress(len(todo)), 0, {}
    waiting, flying = list(reversed(todo)), {}
    pool = make_pool(place, workers)
    try:
        while flying or (waiting and time.monotonic() - began < 60 * minutes):
            while waiting and len(flying) < workers and time.monotonic() - began < 60 * minutes:
                claim, run = waiting.pop()
                flying[pool.submit(work, type(claim), run)] = (claim, run)
            finished, _ = concurrent.futures.wait(flying, return_when=concurrent.futures.FIRST_COMPLETED)
            broken = False
            for future in finished:
                claim, run = flying.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    broken = True
                    deaths[run] = deaths.get(run, 0) + 1
                    if deaths[run] < 2:  # it may have been the other one that died
                        waiting.append((claim, run))
                        continue
                    result = {"error": "the process died twice in this run"}
                place.write(claim, run, result)
                failed += "error" in result
                progress.step(f"{run.claim}: {run.key}", failed)
            if broken:
                # What else was in the air died too
                for claim, run in flying.values():
                    deaths[run] = deaths.get(run, 0) + 1
                    waiting.append((claim, run))
                flying.clear()
                pool.shutdown(wait=False)
                pool = make_pool(place, workers if max(deaths.values()) < 2 else 1)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        progress.close()
    return len(waiting)


class Progress:
    """A bar in a terminal; elsewhere a line every half minute."""

    def __init__(self, total: int, every: float = 30.0):
        self.total, self.every, self.done = total, every, 0
        self.began = self.said = time.monotonic()
        self.bar = tqdm(total=total, unit="run") if sys.stderr.isatty() else None

    def step(self, name: str, failed: int) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.set_description(name + (f" ({failed} failed)" if failed else ""))
            self.bar.update()
        elif time.monotonic() - self.said >= self.every or self.done == self.total:
            self.said = time.monotonic()
            left = (self.said - self.began) / self.done * (self.total - self.done) / 60
            print(f"{self.done} of {self.total} runs, {failed} failed, about {left:.0f} min left ({name})", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def make_pool(place: Place, workers: int) -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer=begin, initargs=(place,))


# The worker's side

_here: dict[str, Any] = {}


def begin(place: Place) -> None:
    """What libraries say goes into a file: it would tear the progress apart."""
    log = os.open(place.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _here["place"] = place
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int) -> None:
    """No worker goes on alone after the command was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def world_of(place: Place) -> Any:
    if "world" not in _here:
        if place.real is None:
            _here["world"] = build(place.folder / "world", place.scale)
        else:
            from . import real

            _here["world"] = real.build(place.folder / "world", place.scale, **place.real)
    return _here["world"]


def work(kind: type[Claim], run: Run) -> dict[str, Any]:
    """One run; an error is a result too."""
    began = time.process_time()
    place = _here["place"]
    try:
        result = kind(place.scale).execute(world_of(place), run)
    except Exception as error:
        traceback.print_exc()
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    return {**result, "seconds": round(time.process_time() - began, 1)}
