"""Whose turn it is: one language model has one KV cache, so that one answer at a time can be in the making.

Whole answers of several threads wait for each other. A stream is drawn step by step, and its reader decides when:

- The thread that reads it may begin something new; the stream then ends with an error that says so, instead of going
  on with another answer's text.
- Other threads wait until it is read to its end, closed or forgotten. A stream from which nobody has drawn for a while
  (:attr:`Turns.patience_s`), or whose reader's thread has ended, no longer keeps them.

Nothing here waits inside of a finalizer, which may run in any thread at any time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from qap_gguf.errors import QapError

T = TypeVar("T")
_POLL_S = 0.02  # a finalizer cannot wake a waiter, so waiters look


class _Reader:
    """Who reads an unfinished stream, and when that was done last."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.touch()

    def touch(self) -> None:
        self.thread = threading.current_thread()
        self.at = time.monotonic()


class Turns:
    """The lock of a model, and the number of its latest answer.

    Attributes:
        lock: held for every native step; reentrant.
        patience_s: how long a stream that nobody draws from keeps other threads waiting, in seconds.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.patience_s = 60.0
        self._changed = threading.Condition(self.lock)
        self._latest = 0
        self._reader: _Reader | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock, once no other thread is reading a stream."""
        with self.lock:
            while self._taken():
                self._changed.wait(_POLL_S)
            yield

    def _taken(self) -> bool:
        reader = self._reader
        if reader is None or reader.thread is threading.current_thread() or not reader.thread.is_alive():
            return False
        return time.monotonic() - reader.at < self.patience_s

    def begin(self) -> int:
        """Number of a new answer, which ends an older one; call it with the lock held."""
        self._latest += 1
        self._reader = None
        return self._latest

    def check(self, number: int) -> None:
        """The answer `number` is the latest.

        Raises:
            QapError: a newer one has the model.
        """
        if number != self._latest:
            raise QapError("this answer was ended by a newer one of the same model; read one at a time")

    def stream(
        self, number: int, items: Generator[T, None, None], around: Callable[[], AbstractContextManager[object]]
    ) -> Stream[T]:
        """`items` for a reader of the answer `number`; each step is drawn within `around`, with the lock held."""
        self._reader = _Reader(number)
        return Stream(self, number, items, around)

    def touch(self, number: int) -> None:
        """The reader of the answer `number` is here."""
        if self._reader is not None and self._reader.number == number:
            self._reader.touch()

    def finish(self, number: int) -> None:
        """The answer `number` is not read any more. Takes no lock, for finalizers call it."""
        reader = self._reader
        if reader is not None and reader.number == number:
            self._reader = None


class Stream(Generic[T]):
    """An iterator over the steps of one answer; see :meth:`Turns.stream`."""

    def __init__(
        self,
        turns: Turns,
        number: int,
        items: Generator[T, None, None],
        around: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._turns, self._number, self._items, self._around = turns, number, items, around
        self._ended = False

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        try:
            with self._turns.lock:
                self._turns.check(self._number)
                self._turns.touch(self._number)
                with self._around():
                    item = next(self._items)
                self._turns.touch(self._number)
                return item
        except BaseException:  # the end too
            self._end()
            raise

    def close(self) -> None:
        """Stop here; the model can be used again at once."""
        with self._turns.lock:
            self._end()
            self._items.close()

    def _end(self) -> None:
        self._ended = True
        self._turns.finish(self._number)

    def __del__(self) -> None:
        self._end()
