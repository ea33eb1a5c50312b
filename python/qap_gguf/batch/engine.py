"""llama-server for a batch: started again where it ends, and each request asked again a few times.

One thread starts the process and watches it for as long as the engine is open: on Linux the process ends with the
thread that started it. Other threads ask; a request whose answer is cut off is asked again, the last time alone, so
that a request that takes the process down takes no other with it for good.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from qap_gguf.errors import NativeError, QapError
from qap_gguf.serve.child import Child
from qap_gguf.serve.health import EVERY_S, PROBE_EVERY_S, most_memory, seconds_to_stall

log = logging.getLogger("qap_gguf.batch")

TRIES: Final = 3
#: Ends without an answer between them after which there is no hope.
_MOST_ENDS: Final = 4 * TRIES
_SETTLE_S: Final = 0.2  # sockets of an ending process are closed a moment before the system calls it ended
_WAIT_S: Final = 0.05


class ClosedError(Exception):
    """The engine was closed while a request waited."""


class LostError(Exception):
    """The process ended each time it was asked this; others may fare better."""


class _Room:
    """Many may be in it, or one that is alone; whoever wants to be alone is let in before others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._alone, self._waiting = 0, False, 0

    @contextlib.contextmanager
    def entered(self, alone: bool) -> Iterator[None]:
        with self._changed:
            if alone:
                self._waiting += 1
                self._changed.wait_for(lambda: not self._inside)
                self._waiting -= 1
            else:
                self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._alone = False
                self._changed.notify_all()


class Engine:
    """A llama-server that is kept alive.

    Args:
        child: not started yet; this object ends it, its owner closes it.
        tries: how often a request is asked, 1 or more, where the process ends while it is answered.
        stalled_seconds: how long its loop may stand still; None is 30, or QAP_SERVE_STALLED_SECONDS.

    Attributes:
        n_restarts: how often it was started again.
    """

    def __init__(self, child: Child, tries: int = TRIES, stalled_seconds: float | None = None) -> None:
        self._child, self._tries = child, tries
        self._stalled_s = seconds_to_stall(stalled_seconds)
        self._room = _Room()
        self._ready, self._stop = threading.Event(), threading.Event()
        self._failed: QapError | None = None
        self._n_now = self._n_ends = self.n_restarts = 0
        self._lock = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, name="qap-engine", daemon=True)

    def start(self) -> None:
        """Start it, and wait until it has loaded the model.

        Raises:
            ModelFileError: it ends before that.
        """
        self._keeper.start()
        self._wait_until_ready()

    def close(self) -> None:
        """End it; requests that wait raise :class:`ClosedError`."""
        self._stop.set()
        if self._keeper.ident is not None:
            while self._keeper.is_alive():
                self._child.terminate()
                self._keeper.join(EVERY_S)

    # --- the thread that keeps it alive ---

    def _keep(self) -> None:
        try:
            while not self._stop.is_set():
                self._child.spawn()
                self._child.wait_until_ready()
                self._ready.set()
                why = self._watch()
                self._ready.clear()
                if why is None:
                    return
                self.n_restarts += 1
                self._n_ends += 1
                if self._n_ends >= _MOST_ENDS:
                    raise NativeError(
                        f"batch: expected llama-server to go on, it {why} {self._n_ends} times without an answer "
                        "between; see --debug"
                    )
                log.warning("llama-server %s; it is started again", why)
        except Exception as err:
            self._failed = err if isinstance(err, QapError) else NativeError(f"batch: llama-server: {err}")
            self._ready.set()

    def _watch(self) -> str | None:
        """Until something is wrong with it, which is told, or the engine is closed: None."""
        probed, most = time.monotonic(), most_memory(self._child)
        while not self._stop.wait(EVERY_S):
            if self._child.status is not None:
                return f"ended ({self._child.last_words()})"
            if self._child.anonymous() > most:
                return f"took {self._child.anonymous() / 2**30:.1f} GiB of memory"
            if self._n_now and time.monotonic() - probed >= min(PROBE_EVERY_S, self._stalled_s):
                if not self._responds():
                    return f"stood still for {self._stalled_s:g} seconds"
                probed = time.monotonic()
        return None

    def _responds(self) -> bool:
        try:
            self._send("GET", "/metrics", b"", self._stalled_s)
        except TimeoutError:
            return False
        except (OSError, http.client.HTTPException):
            return True  # it ended, which is seen next
        return True

    # --- requests, from any thread ---

    def ask(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and body of the answer to a request, which waits for a slot.

        Raises:
            LostError: the process ended each time.
            QapError: it cannot be started any more.
            ClosedError: the engine was closed.
        """
        data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        for number in range(1, self._tries + 1):
            with self._room.entered(alone=1 < number == self._tries):
                found = self._answer(path, data)
            if found is not None:
                return found
        raise LostError(f"the model's process ended {self._tries} times while it answered this row")

    def _answer(self, path: str, data: bytes) -> tuple[int, bytes] | None:
        """An answer; None where the process ended before it was whole."""
        while True:
            self._wait_until_ready()
            self._count(1)
            try:
                found = self._send("POST", path, data)
            except ConnectionRefusedError:  # it ended before it was asked, and that is not seen yet
                time.sleep(_SETTLE_S)
                continue
            except (OSError, http.client.HTTPException):
                if self._stop.is_set():
                    raise ClosedError from None
                time.sleep(_SETTLE_S)
                return None
            finally:
                self._count(-1)
            self._n_ends = 0
            return found

    def _count(self, change: int) -> None:
        with self._lock:
            self._n_now += change

    def _wait_until_ready(self) -> None:
        while True:
            if self._stop.is_set():
                raise ClosedError
            if self._ready.wait(_WAIT_S):
                if self._failed is not None:
                    raise self._failed
                if self._child.status is None:
                    return
                time.sleep(_WAIT_S)  # it ended, and is started again soon

    def _send(self, method: str, path: str, data: bytes, timeout: float | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._child.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self._child.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, data, headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()
