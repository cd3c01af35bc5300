"""Values by number, loaded in threads before they are asked for and kept up to a limit of bytes.

What is returned never depends on what was loaded ahead: this is a cache, and forgetting it costs time only.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Ahead(Generic[Value]):
    """`load(number)` and `size(value)` (bytes) of anything; an error of `load` is kept and raised again at each `get`.

    Safe in several threads. A pickled or forked copy starts empty.
    """

    def __init__(
        self, load: Callable[[int], Value], size: Callable[[Value], int], limit_bytes: int, threads: int
    ) -> None:
        self._load, self._size, self._limit_bytes, self._threads = load, size, limit_bytes, threads
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._found: OrderedDict[int, Future[Value]] = OrderedDict()
        self._held_bytes = 0
        self._pool: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[type[Ahead[Value]], tuple[object, ...]]:
        return Ahead, (self._load, self._size, self._limit_bytes, self._threads)

    def get(self, number: int) -> Value:
        """The value, loaded now if it was not ahead of time."""
        future, mine = self._future(number)
        if mine:
            self._run(future, number)
        return future.result()

    def hint(self, numbers: Iterable[int]) -> None:
        """Begin to load these; returns at once."""
        for number in numbers if self._threads else ():
            future, mine = self._future(number)
            if mine:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
                self._pool.submit(self._run, future, number)

    def _future(self, number: int) -> tuple[Future[Value], bool]:
        """(the future of this number, whether the caller has to run it)."""
        if self._pid != os.getpid():  # forked: the threads are not here, and a lock may have been held
            self._forget()
        with self._lock:
            future = self._found.get(number)
            if future is not None:
                self._found.move_to_end(number)
                return future, False
            future = self._found[number] = Future()
            return future, True

    def _run(self, future: Future[Value], number: int) -> None:
        try:
            value = self._load(number)
        except BaseException as error:
            future.set_exception(error)
            return
        future.set_result(value)
        with self._lock:
            self._held_bytes += self._size(value)
            for old in list(self._found):
                if self._held_bytes <= self._limit_bytes or old == number:
                    break
                done = self._found[old]
                if done.done() and done.exception() is None:
                    self._held_bytes -= self._size(done.result())
                    del self._found[old]
