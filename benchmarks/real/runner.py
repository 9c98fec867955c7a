"""Runs in processes: each is done once and written at once; one that fails, or whose process dies, does not take others along."""

import concurrent.futures
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trl_ext.data.cache import write_atomically

from .data import SOURCES, Size, key_of, prepare, prepared
from .losses import SIDES


SEARCH_SEED = 0


@dataclass(frozen=True)
class Run:
    """One training: of a search for the setting, measured on validation pairs, or with the one that was found, measured on test pairs."""

    data: str
    loss: str
    setting: int
    seed: int

    @property
    def split(self) -> str:
        return "validation" if self.seed == SEARCH_SEED else "test"

    @property
    def key(self) -> str:
        return f"{self.data}/{self.loss}/{self.split}-setting{self.setting}-seed{self.seed}"


class Place:
    """
    Where the runs lie, and what is known of them.

    Args:
        folder (`Path`): Of all runs of one size.
        size (`Size`): How much is done.
        keys (`dict[str, str]`): For each set of pairs what its start is made of.
        losses (`list[str]`): In the order of the report.
    """

    def __init__(self, folder: Path, size: Size, keys: dict[str, str], losses: list[str]):
        self.folder, self.size, self.keys, self.losses = folder, size, keys, losses
        self.results: dict[Run, dict[str, Any]] = {}
        for file in sorted(folder.glob("*/runs/*/*.json")):
            found = json.loads(file.read_text())
            run = Run(**found["run"])
            if run.data in keys and run.loss in losses and found["arguments"] == self.arguments(run):
                self.results[run] = found["result"]

    def start(self, data: str) -> Path:
        return self.folder / data / "start"

    def setting(self, run: Run) -> dict[str, Any]:
        return SIDES[run.loss].settings()[run.setting]

    def arguments(self, run: Run) -> dict[str, Any]:
        """What a run depends on: where it changes, the run is done anew."""
        settings = SIDES[run.loss].settings()
        setting = settings[run.setting] if run.setting < len(settings) else None
        side = {**asdict(SIDES[run.loss]), "betas": None}
        depends = {
            "start": self.keys[run.data],
            "side": side,
            "setting": setting,
            "steps": self.size.steps,
            "batch": self.size.batch,
        }
        return json.loads(json.dumps(depends))

    def write(self, run: Run, result: dict[str, Any]) -> None:
        name = run.key.split("/")[-1]
        written = {"run": asdict(run), "arguments": self.arguments(run), "result": result}
        write_atomically(
            self.folder / run.data / "runs" / run.loss / f"{name}.json", json.dumps(written, indent=1) + "\n"
        )
        self.results[run] = result

    def searched(self, data: str, loss: str) -> list[Run]:
        return [Run(data, loss, setting, SEARCH_SEED) for setting in range(len(SIDES[loss].settings()))]

    def chosen(self, data: str, loss: str) -> int | None:
        """
        The setting with the best accuracy on validation pairs, the first of equal ones; `None` before all have run, and where all have
        failed.
        """
        runs = self.searched(data, loss)
        if any(run not in self.results for run in runs):
            return None
        there = [run for run in runs if "error" not in self.results[run]]
        return max(there, key=lambda run: self.results[run]["accuracy"]).setting if there else None

    def final(self, data: str, loss: str) -> list[Run]:
        """The runs that are reported; none before the setting is known."""
        setting = self.chosen(data, loss)
        return [] if setting is None else [Run(data, loss, setting, seed) for seed in range(1, self.size.seeds + 1)]

    def todo(self) -> list[Run]:
        """What can be done now: one set of pairs after the other, and of each whole seeds, so that what is there can be compared."""
        runs = []
        for data in self.keys:
            known = [run for loss in self.losses for run in self.searched(data, loss) + self.final(data, loss)]
            runs += sorted((run for run in known if run not in self.results), key=lambda run: run.seed)
        return runs

    def total(self) -> int:
        """Runs that there are in the end, those without a setting left out."""
        return sum(
            len(self.searched(data, loss)) + (0 if self.failed(data, loss) else self.size.seeds)
            for data in self.keys
            for loss in self.losses
        )

    def failed(self, data: str, loss: str) -> bool:
        """Whether no setting has finished."""
        return all("error" in self.results.get(run, {}) for run in self.searched(data, loss))

    def forget_failures(self) -> None:
        self.results = {run: result for run, result in self.results.items() if "error" not in result}


def prepare_all(folder: Path, data: Path, names: list[str], size: Size, workers: int) -> dict[str, dict[str, Any]]:
    """The start of each set of pairs, made side by side where it is not there; what is known of them, by name."""
    starts = {name: folder / name / "start" for name in names}
    about = {name: prepared(starts[name], key_of(SOURCES[name], data, size)) for name in names}
    missing = [name for name in names if about[name] is None]
    if not missing:
        return about
    print(f"Tokenizer, pre-trained model and derived columns: {', '.join(missing)}", flush=True)
    pool = make_pool(folder, workers)
    try:
        making = {name: pool.submit(prepare, SOURCES[name], data, starts[name], size) for name in missing}
        return about | {name: future.result() for name, future in making.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_all(place: Place, workers: int, minutes: float) -> int:
    """Does what is not done yet; returns how many runs are left, where time ran out."""
    if not place.todo():
        return 0
    began, progress = time.monotonic(), Progress(place)
    flying: dict[concurrent.futures.Future, Run] = {}
    deaths: dict[Run, int] = {}
    pool = make_pool(place.folder, workers)
    try:
        while True:
            waiting = [run for run in place.todo() if run not in flying.values()]
            while waiting and len(flying) < workers and time.monotonic() - began < 60 * minutes:
                run = waiting.pop(0)
                try:
                    flying[pool.submit(work, place.start(run.data), place.size, run)] = run
                except BrokenProcessPool:
                    if not flying:  # no run has done it
                        raise
                    break  # what is in the air will say so
            if not flying:
                return len(place.todo())
            finished, _ = concurrent.futures.wait(flying, return_when=concurrent.futures.FIRST_COMPLETED)
            broken = False
            for future in finished:
                run = flying.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    broken, result = True, died(run, deaths)
                if result is not None:
                    place.write(run, result)
                    progress.step(run)
            if broken:
                # What else was in the air died too; alone in its pool, the next one to die is the one to blame
                for run in flying.values():
                    died(run, deaths)
                flying.clear()
                pool.shutdown(wait=False)
                workers = 1
                pool = make_pool(place.folder, workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        progress.close()


def died(run: Run, deaths: dict[Run, int]) -> dict[str, Any] | None:
    """Counts a death; a run that has died three times is one that failed."""
    deaths[run] = deaths.get(run, 0) + 1
    return {"error": f"its process died {deaths[run]} times"} if deaths[run] > 2 else None


class Progress:
    """A bar in a terminal; elsewhere a line every half minute."""

    def __init__(self, place: Place, every: float = 30.0):
        self.place, self.every, self.before = place, every, len(place.results)
        self.began = self.said = time.monotonic()
        self.bar = tqdm(total=place.total(), initial=self.before, unit="run") if sys.stderr.isatty() else None

    def step(self, run: Run) -> None:
        done, total = len(self.place.results), self.place.total()
        failed = sum("error" in result for result in self.place.results.values())
        if self.bar is not None:
            self.bar.total = total
            self.bar.set_description(run.key + (f" ({failed} failed)" if failed else ""))
            self.bar.update()
        elif time.monotonic() - self.said >= self.every or done == total:
            self.said = time.monotonic()
            left = (self.said - self.began) / (done - self.before) * (total - done) / 60
            print(f"{done} of {total} runs, {failed} failed, about {left:.0f} min left ({run.key})", flush=True)

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


def work(start: Path, size: Size, run: Run) -> dict[str, Any]:
    """One run; an error is a result too."""
    from . import training

    began, used = time.monotonic(), time.process_time()
    side = SIDES[run.loss]
    try:
        result = training.execute(start, side, side.settings()[run.setting], run.seed, size, run.split)
    except Exception as error:
        traceback.print_exc()
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    return {
        **result,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
    }
