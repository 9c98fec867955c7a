"""Runs that kill themselves at chosen moments, and come to the end of one that nobody killed. `python -m tests.faults` kills at random."""

import os
import signal
import time
from functools import partial

import pytest

from tests import children
from tests.faults.__main__ import watched
from tests.faults.runs import RUNS, difference


TERM, KILL = signal.SIGTERM, signal.SIGKILL

# One life after the other: what happens, at which moment, with which signal, and what is finished then
LIVES = {
    "offline": [
        ("tear", "write checkpoint-1/model", KILL, "anew"),
        ("tear", "write checkpoint-2/trainer_state", KILL, "checkpoint-1"),
        ("kill", "rename checkpoint-3/trl_ext_contents", TERM, "checkpoint-2"),
        ("kill", "^stepped", KILL, "checkpoint-2"),
    ],
    "online": [
        ("tear", "write checkpoint-1/block_0", KILL, "anew"),
        ("kill", "write checkpoint-3/trainer_state", TERM, "checkpoint-2"),
        ("tear", "write checkpoint-3/optimizer", KILL, "checkpoint-2"),
    ],
    "scores": [("tear", "write cache", KILL, "0 scores"), ("kill", "write end", TERM, "16 scores")],
    "samples": [("tear", "write cache/.*/2.json", KILL, "2 chunks"), ("kill", "rename cache/.*/4.json", TERM, "4 chunks")],
    "rounds": [
        ("tear", "write round-1/scored/data", KILL, "1 stages"),
        ("kill", "write round-1/train/checkpoint-2/trainer_state", TERM, "3 stages"),
        ("tear", "write round-1/model/model", KILL, "3 stages"),
        ("kill", "mkdir round-2", TERM, "4 stages"),
        ("tear", "write round-2/train/checkpoint-2/model", KILL, "7 stages"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", LIVES)
def test_killed_and_started_again(name, model, tmp_path):
    run, folder, whole, log = RUNS[name], tmp_path / "killed", tmp_path / "whole", tmp_path / "log"
    for each in (folder, whole):
        each.mkdir()
    assert children.run(partial(run.command, whole, model), log) == 0, log.read_text()
    for what, moment, number, kept in LIVES[name]:
        work = partial(watched, run, folder, model, matching=moment, what=what, number=number)
        assert children.run(work, log) == -number, log.read_text()
        assert run.kept(folder)[0] == kept
    assert children.run(partial(run.command, folder, model), log) == 0, log.read_text()
    assert difference(run.end(whole), run.end(folder)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_reward_function_that_hangs_is_interrupted(number, model, tmp_path, monkeypatch):
    """What is scored by then is kept, and not asked for again."""
    run, log, record = RUNS["scores"], tmp_path / "log", tmp_path / "record"
    monkeypatch.setenv("TEST_HANGS", "3")
    pid = children.start(partial(run.command, tmp_path, model), log)
    while run.kept(tmp_path)[1] < 6:
        time.sleep(0.01)
    time.sleep(0.05)  # in the fourth call
    os.kill(pid, number)
    assert children.ended(pid) != 0
    monkeypatch.delenv("TEST_HANGS")
    assert children.run(partial(watched, run, tmp_path, model, record=record), log) == 0, log.read_text()
    # 16 texts in twos, of which six were scored
    assert record.read_text().splitlines().count("reward") == 5
