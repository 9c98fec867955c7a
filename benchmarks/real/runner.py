"""Where the runs on real pairs lie, which of them can be done, and what one is."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pool

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
    executor = pool.make_pool(folder, workers)
    try:
        making = {name: executor.submit(prepare, SOURCES[name], data, starts[name], size) for name in missing}
        return about | {name: future.result() for name, future in making.items()}
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def run_all(place: Place, workers: int, minutes: float) -> int:
    """Does what is not done yet; returns how many runs are left, where time ran out."""

    def todo() -> list[pool.Job]:
        return [pool.Job(run.key, work, (place.start(run.data), place.size, run)) for run in place.todo()]

    def write(job: pool.Job, result: dict[str, Any]) -> None:
        place.write(job.arguments[-1], result)

    def left() -> int:
        return place.total() - len(place.results)

    return pool.run_all(todo, write, left, place.folder, workers, minutes)


def work(start: Path, size: Size, run: Run) -> dict[str, Any]:
    """One run, in a process of the pool."""
    from . import training

    side = SIDES[run.loss]
    return training.execute(start, side, side.settings()[run.setting], run.seed, size, run.split)
