"""Whose turn it is: one language model has one KV cache, so that one answer at a time can be in the making.

An answer takes a number when its prompt goes into the KV cache. Each further step holds the lock and looks whether the
number is still the latest; an answer that was overtaken ends with a clear error instead of another answer's text.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TypeVar

from qap_gguf.errors import QapError

T = TypeVar("T")


class Turns:
    """The lock of a model and the number of its latest answer.

    Attributes:
        lock: held for every native step; reentrant.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._latest = 0

    def begin(self) -> int:
        """Number of a new answer; call it with the lock held."""
        self._latest += 1
        return self._latest

    def check(self, number: int) -> None:
        """The answer `number` is the latest.

        Raises:
            QapError: a newer one has the model.
        """
        if number != self._latest:
            raise QapError("this answer was ended by a newer one of the same model; read one at a time")

    def steps(self, number: int, items: Iterator[T]) -> Iterator[T]:
        """`items`, each drawn with the lock held and only while the answer is the latest."""
        while True:
            with self.lock:
                self.check(number)
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
