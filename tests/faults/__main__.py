"""
Kills real runs at random, starts them again, and compares what they come to with runs that nobody disturbed.

    python -m tests.faults --kills 50 --seed 0

Half of the moments are drawn from the time that a run takes. The others are drawn from all that it does to its folder and to its weights,
and come exactly then: before a file is written, renamed or removed, when half of it is written, before a step and after it, while
rewards are asked.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path


# Before transformers is imported
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)
os.environ.setdefault("TRITON_INTERPRET", "1")

from rich.console import Console
from rich.table import Table

from tests import children
from tests.faults.model import tiny_model
from tests.faults.moments import Moments
from tests.faults.runs import RUNS, Run, difference


CLOSE = 1e-6  # between the ends of a run that was killed and one that was not
LIVES = 3  # most kills of one run before it is left in peace
SHOWN = 52


@dataclass
class Undisturbed:
    """A run that nobody killed: what it came to, what it did, and the seconds that it took."""

    end: dict
    moments: list[str]
    seconds: float


def watched(run: Run, folder: Path, model: Path, **moments) -> None:
    Moments(folder, **moments)
    run.command(folder, model)


def undisturbed(name: str, base: Path, model: Path) -> Undisturbed:
    run, folder, record = RUNS[name], base / name, base / f"{name}.moments"
    folder.mkdir()
    began = time.monotonic()
    if children.run(partial(watched, run, folder, model, record=record), base / f"{name}.log"):
        sys.exit(f"{name} failed without a kill:\n{(base / f'{name}.log').read_text()[-3000:]}")
    return Undisturbed(run.end(folder), record.read_text().splitlines(), time.monotonic() - began)


def one_kill(chance: random.Random, run: Run, whole: Undisturbed, start: Callable, log: Path) -> tuple[str, int, int]:
    """Start a run and kill it: where, with which signal, and how it ended."""
    number = chance.choice((signal.SIGKILL, signal.SIGTERM))
    if chance.random() < 0.5:
        after = chance.random() * whole.seconds
        return f"after {after:.2f} s", number, children.run(start, log, kill_after=after, number=number)
    at, what = chance.randrange(len(whole.moments)), chance.choice(("kill", "tear"))
    status = children.run(partial(start, at=at, what=what, number=number), log)
    # A run that goes on does less than a whole one, and may have ended before this moment
    words = "half-way in" if what == "tear" and whole.moments[at].startswith("write") else "before"
    return f"{words} {whole.moments[at]}", number, status


def main(kills: int, seed: int, names: list[str]) -> int:
    chance, base = random.Random(seed), Path(tempfile.mkdtemp(prefix="faults-"))
    model = tiny_model(base / "model")
    ends = {name: undisturbed(name, base, model) for name in names}
    table = Table("run", "killed", "signal", "kept", "then", title=f"{kills} kills, seed {seed}")
    done, failed = Counter(), 0
    while done.total() < kills:
        name = names[chance.randrange(len(names))]
        run, whole, folder, log = RUNS[name], ends[name], base / "killed", base / "killed.log"
        folder.mkdir()
        rows, status = [], 0
        for _ in range(chance.randint(1, LIVES)):
            where, number, status = one_kill(chance, run, whole, partial(watched, run, folder, model), log)
            if status != -number:
                break  # it ended before, well or not
            done[name, signal.Signals(number).name] += 1
            rows.append((name, where, signal.Signals(number).name, run.kept(folder)[0]))
        if status <= 0:
            status = children.run(partial(run.command, folder, model), log)
        gap = None if status else difference(whole.end, run.end(folder))
        good = gap is not None and gap <= CLOSE
        then = (
            "equal to the bit"
            if gap == 0
            else f"FAILED, {log.read_text()[-1500:]}"
            if status
            else f"differs by {gap:.1e}"
        )
        for row in rows:
            table.add_row(row[0], row[1][:SHOWN], *row[2:], then if row is rows[-1] else "killed again")
        if rows:
            print(
                f"{done.total():4} kills  {rows[-1][0]:8} {' | '.join(row[1] for row in rows)[:110]}  {then[:300]}",
                flush=True,
            )
        if good or not rows:
            shutil.rmtree(folder)
        else:
            failed += 1
            folder.rename(base / f"failed-{failed}")
    Console().print(table)
    for (name, number), count in sorted(done.items()):
        print(f"{name:8} {number}  {count}")
    print(
        f"{done.total()} kills, {failed} runs that did not come to the same end" + (f": see {base}" if failed else "")
    )
    if not failed:
        shutil.rmtree(base)
    return int(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    given = parser.parse_args()
    sys.exit(main(given.kills, given.seed, given.runs))
