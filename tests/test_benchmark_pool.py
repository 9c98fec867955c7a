"""The processes in which benchmarks train: results, errors and deaths are kept, time runs out, progress is told."""

import concurrent.futures
import math
from concurrent.futures.process import BrokenProcessPool

import pytest

from tests import dying
from tests.benchmark_modules import module


@pytest.fixture
def pool(monkeypatch):
    """The module, with threads in place of processes."""
    found = module("pool")
    monkeypatch.setattr(found, "make_pool", lambda folder, workers: Threads(workers))
    return found


def dead():
    future = concurrent.futures.Future()
    future.set_exception(BrokenProcessPool("killed"))
    return future


class Threads(concurrent.futures.ThreadPoolExecutor):
    """A job of this name takes the pool along."""

    def submit(self, call, *args):
        return dead() if "killed" in args else super().submit(call, *args)


def answer(name):
    if name == "wrong":
        raise RuntimeError("too\nlittle memory")
    return {"answer": name.upper()}


def run(pool, names, folder, workers=2, minutes=math.inf, call=answer):
    """The results by name, and how many jobs were left."""
    results = {}

    def todo():
        return [pool.Job(name, call, (name,)) for name in names if name not in results]

    left = pool.run_all(
        todo, lambda job, result: results.update({job.name: result}), lambda: len(todo()), folder, workers, minutes
    )
    return results, left


def test_each_job_is_done_once_and_an_error_is_a_result(pool, tmp_path):
    calls = []

    def counted(name):
        calls.append(name)
        return answer(name)

    results, left = run(pool, ["a", "wrong", "b"], tmp_path, call=counted)
    assert left == 0 and sorted(calls) == ["a", "b", "wrong"]
    assert [results[name]["answer"] for name in "ab"] == ["A", "B"]
    assert results["wrong"]["error"] == "RuntimeError: too little memory"
    assert all(0 <= result[key] < 9 for result in results.values() for key in ("seconds", "cpu_seconds"))
    assert run(pool, [], tmp_path) == ({}, 0)


def test_what_becomes_known_later_is_done_too(pool, tmp_path):
    results = {}

    def todo():
        names = ["first"] + (["second"] if "first" in results else [])
        return [pool.Job(name, answer, (name,)) for name in names if name not in results]

    pool.run_all(
        todo, lambda job, result: results.update({job.name: result}), lambda: 2 - len(results), tmp_path, 2, 9
    )
    assert list(results) == ["first", "second"]


def test_no_job_is_begun_after_the_time(pool, tmp_path):
    assert run(pool, ["a", "b"], tmp_path, minutes=0.0) == ({}, 2)


def test_a_process_that_dies_does_not_take_the_others_along(pool, tmp_path):
    results, left = run(pool, ["a", "killed", "b", "c"], tmp_path)
    assert left == 0 and results["killed"] == {"error": "its process died twice"}
    assert [results[name]["answer"] for name in "abc"] == ["A", "B", "C"]


def test_processes_of_their_own(tmp_path):
    """One takes its pool along twice; what flew beside it is done in the next."""
    results, left = run(module("pool"), ["killed", "a", "b"], tmp_path, call=dying.job)
    assert left == 0 and results["killed"] == {"error": "its process died twice"}
    assert [results[name]["answer"] for name in "ab"] == ["A", "B"]
    assert (tmp_path / "log.txt").exists()


def test_who_dies_beside_another_is_not_to_blame(pool, tmp_path, monkeypatch):
    """Both jobs of a pool die with it; alone in the next one, the innocent one finishes."""
    sizes = []

    class Falling(concurrent.futures.Executor):
        def submit(self, *args):
            return dead()

    threads = pool.make_pool

    def make_pool(folder, workers):
        sizes.append(workers)
        return threads(folder, workers) if len(sizes) > 1 else Falling()

    monkeypatch.setattr(pool, "make_pool", make_pool)
    results, left = run(pool, ["a", "b"], tmp_path)
    assert left == 0 and sizes == [2, 1] and [results[name]["answer"] for name in "ab"] == ["A", "B"]


def test_a_pool_that_breaks_between_two_jobs_is_made_anew(pool, tmp_path, monkeypatch):
    submitted = []

    class Broken(concurrent.futures.Executor):
        def submit(self, *args):
            if submitted.append(args) or len(submitted) > 1:
                raise BrokenProcessPool("killed")
            return dead()

    threads = pool.make_pool
    monkeypatch.setattr(pool, "make_pool", lambda *args: threads(*args) if submitted else Broken())
    results, left = run(pool, ["a", "b"], tmp_path)
    assert left == 0 and len(submitted) == 2 and [results[name]["answer"] for name in "ab"] == ["A", "B"]


def test_a_pool_in_which_nothing_can_run_is_an_error(pool, tmp_path, monkeypatch):
    class Broken(concurrent.futures.Executor):
        def submit(self, *args):
            raise BrokenProcessPool("a process died at its start")

    monkeypatch.setattr(pool, "make_pool", lambda *args: Broken())
    with pytest.raises(BrokenProcessPool, match="at its start"):
        run(pool, ["a"], tmp_path)


def test_progress_elsewhere_than_in_a_terminal(pool, capsys, monkeypatch):
    clock, left = iter(range(0, 1000, 10)), [10]
    monkeypatch.setattr(pool.time, "monotonic", lambda: float(next(clock)))
    progress = pool.Progress(lambda: left[0], every=30)
    progress.bar = None
    for number in range(10):
        left[0] -= 1
        progress.step(f"run {number}", number == 3)
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 5 and lines[-1] == "10 of 10 runs, 1 failed, about 0 min left (run 9)"


def test_no_worker_outlives_the_command(pool, monkeypatch):
    parents, slept = iter([5, 5, 1]), []
    monkeypatch.setattr(pool.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(pool.time, "sleep", slept.append)
    monkeypatch.setattr(pool.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit):
        pool.end_with(5)
    assert len(slept) == 2
