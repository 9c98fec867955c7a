"""Substitutes for what a library looks up globally, without one thread seeing another's."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any


class Substitute:
    """
    Something of a library that is replaced while at least one thread needs it, and acts only for the threads that do.

    The library's own names are global, so two trainers in two threads would otherwise take each other's substitute for the
    original and leave it in place for good.

    Args:
        install (`Callable`):
            Puts the substitute in place and returns a function that removes it. It is given the context variable whose value
            is what the running thread asked for, or `None` where the original is to act.
    """

    def __init__(self, install: Callable[[ContextVar], Callable[[], None]]):
        self._install = install
        self._current: ContextVar[Any] = ContextVar("current", default=None)
        self._lock, self._users = threading.Lock(), 0
        self._remove: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def acting(self, value: Any) -> Iterator[None]:
        """While open, the substitute acts in this thread, with `value`."""
        with self._lock:
            if not self._users:
                self._remove = self._install(self._current)
            self._users += 1
        token = self._current.set(value)
        try:
            yield
        finally:
            self._current.reset(token)
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._remove()
