"""Several runs at a time, in processes of their own."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.demo.data import Task, measure, world_tasks
from trl_ext.demo.training import Plan, one_thread, quiet, train


Each = Callable[[Callable[..., Any], Sequence[tuple]], Iterator[Any]]


@contextlib.contextmanager
def processes(number: int) -> Iterator[Each]:
    """
    `each(function, jobs)`, which gives the results of the calls as they come, in any order.

    One process makes the calls here. More of them are started at once, so that they load while the start is fine-tuned.
    """
    if number == 1:
        yield lambda function, jobs: (function(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(number, context, initializer=begin)
    for _ in range(number):
        pool.submit(os.getpid)

    def each(function: Callable[..., Any], jobs: Sequence[tuple]) -> Iterator[Any]:
        futures = [pool.submit(function, *job) for job in jobs]
        return map(result, concurrent.futures.as_completed(futures))

    try:
        yield each
    finally:
        pool.shutdown(cancel_futures=True)


def result(future: concurrent.futures.Future) -> Any:
    """The result, or the error: one about what the user gave is raised anew here, where the command line knows it for that."""
    try:
        return future.result()
    except ValueError as error:
        raise ValueError(str(error)) from error


# What a process enters and never leaves
_for_life = contextlib.ExitStack()


def begin() -> None:
    """A process ends with Ctrl-C, silently, and with the one that started it, however that one ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _for_life.enter_context(quiet())
    _for_life.enter_context(one_thread())


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@functools.lru_cache(maxsize=1)
def start_in(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The start, read once by each process."""
    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(folder / "start")


def prepare(plan: Plan, seed: int, kinds: list[str]) -> list[Task]:
    """The pairs of a seed in the small world, and where its paths begin."""
    model, tokenizer = start_in(plan.folder)
    tasks = world_tasks(model, tokenizer, seed, kinds, pairs=not plan.online)
    return [measured_start(plan, task) for task in tasks]


def measured_start(plan: Plan, task: Task) -> Task:
    """The task with the start as a point: it is the reference, and the KL to itself is 0."""
    model, tokenizer = start_in(plan.folder)
    task.start, task.before = measure(model, model, tokenizer, task)
    if not task.reward_known:
        task.start["accuracy"] = 0.5  # all implicit rewards are 0: ties
    return task


def run_once(plan: Plan, name: str, task: Task) -> dict[str, Any]:
    """One training. What the loss cannot learn from in data of the user's is a result too: `skipped`, the reason."""
    try:
        return train(name, task, *start_in(plan.folder), plan)
    except ValueError as error:
        if task.reward_known:
            raise
        return {"loss": name, "data": task.name, "seed": task.seed, "skipped": str(error)}
