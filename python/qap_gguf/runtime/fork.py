"""What a fork leaves behind: OpenMP's threads, which ggml waits for in the child for ever.

One thread is none of them: models that compute with one thread go on in a forked process.
"""

from __future__ import annotations

import os

from qap_gguf.errors import QapError

_state = {"threads": False, "forked": False}


def _after_fork() -> None:
    _state["forked"] = _state["forked"] or _state["threads"]


os.register_at_fork(after_in_child=_after_fork)


def note_threads(n_threads: int) -> None:
    """A model of this process computes with so many threads."""
    _state["threads"] = _state["threads"] or n_threads > 1


def check_process(n_threads: int) -> None:
    """This process can compute with so many threads.

    Raises:
        QapError: it was forked from one whose models computed with several.

    Example:
        >>> check_process(8)  # a process that was started, not forked
    """
    if n_threads > 1 and _state["forked"]:
        raise QapError(
            "expected a process that was started anew, got one that was forked from a process with a model, where "
            'native threads are missing; use multiprocessing.get_context("spawn")'
        )
