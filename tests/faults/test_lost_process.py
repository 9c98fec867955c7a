"""Two processes on gloo, of which one is lost: the other ends with an error, and what was finished stays."""

import os
import signal
import socket
from functools import partial

from accelerate.state import AcceleratorState, GradientState, PartialState

from tests import children
from tests.faults.__main__ import watched
from tests.faults.runs import RUNS


def one_of_two(rank, port, work):
    """A process of a launch of two."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    work()


def two(folder, first, second):
    """Start both; their ids and logs."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    logs = [folder / f"log-{rank}" for rank in range(2)]
    pids = [
        children.start(partial(one_of_two, rank, port, work), logs[rank]) for rank, work in enumerate((first, second))
    ]
    return pids, logs


def test_the_other_process_ends(model, tmp_path):
    run, folder = RUNS["offline"], tmp_path / "run"
    folder.mkdir()
    lost = partial(watched, run, folder, model, matching="write checkpoint-2/rng_state_1", number=signal.SIGKILL)
    (other, killed), logs = two(tmp_path, partial(run.command, folder, model), lost)
    assert children.ended(killed) == -signal.SIGKILL, logs[1].read_text()
    assert children.ended(other) == 1
    assert "RuntimeError" in logs[0].read_text() and "gloo" in logs[0].read_text().lower()
    assert run.kept(folder)[0] == "checkpoint-1"
