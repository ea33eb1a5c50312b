"""Ctrl-C while C code calls back into Python: an exception there is printed and forgotten, the interrupt with it.

llama-cpp-python's log callback is such a place: a KeyboardInterrupt that Python raises in it while a model is loaded
never arrives (ctypes, "Exception ignored on calling ctypes callback function").
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Note Ctrl-C instead of raising it, and raise KeyboardInterrupt at the end of the block.

    Only in the main thread, the one that Python's signal handlers run in, and only where Ctrl-C has Python's own
    handler: a program that set another knows what it does.

    Example:
        >>> import signal
        >>> try:
        ...     with held_back():
        ...         signal.raise_signal(signal.SIGINT)
        ...         print("still here")
        ... except KeyboardInterrupt:
        ...     print("interrupted")
        still here
        interrupted
    """
    own = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or own is not signal.default_int_handler:
        yield
        return
    heard: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        heard.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)
        if heard:
            raise KeyboardInterrupt
