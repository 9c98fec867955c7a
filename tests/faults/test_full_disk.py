"""A disk that is full: one message, nothing that was finished is lost, and the next run goes on to the same end."""

import errno
import os
import re
import resource
import signal
from functools import partial

import pytest

from tests import children
from tests.faults.__main__ import watched
from tests.faults.runs import RUNS, difference
from trl_ext.data import cache


# The file with which the disk is full; what is finished then; what the message says
FULL = [
    ("offline", "write checkpoint-2/optimizer", "checkpoint-1", "checkpoint-2 cannot be written .*resume from .*checkpoint-1"),
    ("online", "write checkpoint-3/block_0", "checkpoint-2", "checkpoint-3 cannot be written .*resume from .*checkpoint-2"),
    ("samples", "write cache/.*/2.json", "2 chunks", "2.json.*No space left on device|No space left on device.*2.json"),
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The end of each run that a test asks for, made once."""
    ends = {}

    def end(name):
        if name not in ends:
            folder = tmp_path_factory.mktemp(name)
            assert children.run(partial(RUNS[name].command, folder, model), folder / "log") == 0
            ends[name] = RUNS[name].end(folder)
        return ends[name]

    return end


@pytest.mark.parametrize(("name", "moment", "kept", "said"), FULL, ids=["the optimizer", "a block", "a chunk"])
def test_room_is_made_and_the_run_goes_on(name, moment, kept, said, model, tmp_path, undisturbed, capfd):
    run, folder, log = RUNS[name], tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    assert children.run(partial(watched, run, folder, model, matching=moment, what="full"), log) == 1
    assert_last_line(log, said)
    assert run.kept(folder)[0] == kept
    assert children.run(partial(run.command, folder, model), log) == 0, log.read_text()
    assert difference(undisturbed(name), run.end(folder)) == 0


def assert_last_line(log, said):
    last = [line for line in log.read_text().splitlines() if line.strip()][-1]
    assert re.search(said, last), last


def limited(run, folder, model, size):
    """No file may become larger, as with a quota: the system itself says so."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        run.command(folder, model)
    finally:  # for the traceback
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("name", "size", "kept", "said"),
    [
        ("offline", 20_000, "anew", "checkpoint-1 cannot be written"),  # the weights
        ("offline", 100_000, "anew", "checkpoint-1 cannot be written"),  # the optimizer
        ("scores", 350, "5 scores", r"File too large.*cache/function-\w+-\w+\.jsonl"),
    ],
)
def test_what_the_system_refuses(name, size, kept, said, model, tmp_path, undisturbed):
    run, folder, log = RUNS[name], tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    assert children.run(partial(limited, run, folder, model, size), log) == 1
    assert_last_line(log, said)
    assert run.kept(folder)[0] == kept
    assert children.run(partial(run.command, folder, model), log) == 0, log.read_text()
    assert difference(undisturbed(name), run.end(folder)) == 0


def test_half_a_file_is_not_left_behind(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device\. What was finished before is on disk.*a\.json"):
        cache.write_atomically(tmp_path / "a.json", "1")
    assert not list(tmp_path.iterdir())
