"""Where the demonstration is: bars in a terminal, elsewhere plain lines now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Lines:
    """
    One line when a task begins, when it ends, and between them when so many seconds have gone by.

    Args:
        console (`Console`): Where they go.
        every (`float`, *optional*, defaults to `10.0`): Seconds.
    """

    def __init__(self, console: Console, every: float = 10.0):
        self.console, self.every = console, every
        self.tasks: list[tuple[str, int, int]] = []
        self.began = self.said = time.monotonic()

    def add_task(self, description: str, total: int) -> int:
        self.tasks.append((description, 0, total))
        self._say(f"{description} ...")
        return len(self.tasks) - 1

    def advance(self, task: int) -> None:
        description, done, total = self.tasks[task]
        self.tasks[task] = (description, done + 1, total)
        if done + 1 == total or time.monotonic() - self.said >= self.every:
            self._say(f"{description}: {done + 1} of {total}")

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        self.console.print(f"[{self.said - self.began:.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()  # who reads a pipe sees it now


@contextmanager
def progress(console: Console) -> Iterator[Bars | Lines]:
    """Something with `add_task(description, total=...)` and `advance(task)`."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, console=console) as bars:
        yield bars
