"""Where the runs of claims lie, and what one is."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pool

from trl_ext.data.cache import write_atomically

from .frame import Claim, Run, Scale
from .toy import TRAINING, build
from .worlds import World


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
    """Does what is not done yet, and with `again` what failed; returns how many runs are left, where time ran out."""
    missing: dict[str, tuple[Claim, Run, pool.Job]] = {}
    for claim in claims:
        for run in claim.runs():
            done = place.result(claim, run)
            if done is None or (again and "error" in done):
                job = pool.Job(f"{run.claim}: {run.key}", work, (place, type(claim), run))
                missing[job.name] = claim, run, job
    # Whole seeds of all claims: what is there when time runs out can be judged
    ordered = sorted(missing, key=lambda name: missing[name][1].seed)

    def write(job: pool.Job, result: dict[str, Any]) -> None:
        claim, run, _ = missing.pop(job.name)
        place.write(claim, run, result)

    def todo() -> list[pool.Job]:
        return [missing[name][2] for name in ordered if name in missing]

    return pool.run_all(todo, write, lambda: len(missing), place.folder, workers, minutes)


# The worker's side

_worlds: dict[Path, World] = {}


def work(place: Place, kind: type[Claim], run: Run) -> dict[str, Any]:
    """One run, in the world of the place, which each process builds once."""
    if place.folder not in _worlds:
        if place.real is None:
            _worlds[place.folder] = build(place.folder / "world", place.scale)
        else:
            from . import real

            _worlds[place.folder] = real.build(place.folder / "world", place.scale, **place.real)
    return kind(place.scale).execute(_worlds[place.folder], run)
