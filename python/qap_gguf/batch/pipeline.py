"""Rows through llama-server: pictures are decoded ahead of it, bounded, and results come as they are done.

Two kinds of threads: some read rows and make requests of them (pictures decoded, PNG, base64), some ask. Between them
is a short queue, and pixels on their way count against a limit, since llama-server holds them decoded until it has made
the encoder's input of them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from qap_gguf.batch.engine import ClosedError, Engine, LostError
from qap_gguf.batch.results import BatchResult, answered, failed
from qap_gguf.batch.rows import CHAT_PATH, Defaults, Row, read_row
from qap_gguf.errors import ConfigError, QapError
from qap_gguf.serve.problems import RefusedError
from qap_gguf.serve.requests import Prepared, Preparer

#: Requests beyond the slots, so that a slot that is free has its next one there, tokenized.
AHEAD: Final = 2
_DECODERS: Final = 2
_FETCHERS: Final = 16  # where pictures may come from the web, which is waited for
_MOST_PIXELS: Final = 200_000_000
_TICK_S: Final = 0.1


class _StoppedError(Exception):
    """The run is over; threads leave."""


class _Pixels:
    """Lets pictures go on while their pixels together are at most `most`; one that is alone always may."""

    def __init__(self, most: int, stop: threading.Event) -> None:
        self._most, self._now, self._stop, self._changed = most, 0, stop, threading.Condition()

    def take(self, n: int) -> None:
        with self._changed:
            while self._now and self._now + n > self._most:
                if self._stop.is_set():
                    raise _StoppedError
                self._changed.wait(_TICK_S)
            self._now += n

    def give(self, n: int) -> None:
        with self._changed:
            self._now -= n
            self._changed.notify_all()


@dataclass
class _Request:
    row: Row
    body: dict[str, Any] = field(repr=False)
    n_pixels: int = 0


class _End:
    """Stands in a queue for the last thing that a thread puts there; `error` is why it ended early."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Run:
    """One pass of rows through an engine.

    Args:
        engine: started.
        preparer: makes requests.
        rows: mappings, pictures, or what a file has; read from other threads, one at a time.
        defaults: what holds where a row says nothing.
        n_parallel: slots of the engine.
        known: ids of rows that are passed over.
    """

    def __init__(
        self,
        engine: Engine,
        preparer: Preparer,
        rows: Iterable[Any],
        defaults: Defaults,
        n_parallel: int,
        known: Container[str] = (),
    ) -> None:
        self._engine, self._preparer, self._defaults, self._known = engine, preparer, defaults, known
        self._rows, self._reading = enumerate(rows, start=1), threading.Lock()
        self._ids: set[str] = set()
        self._n_decoders = _FETCHERS if preparer.settings.sources.allow_urls else _DECODERS
        self._n_askers = n_parallel + AHEAD
        self._stop = threading.Event()
        self._pixels = _Pixels(_MOST_PIXELS, self._stop)
        self._requests: queue.Queue[_Request | _End] = queue.Queue(_DECODERS)
        self._results: queue.Queue[BatchResult | _End] = queue.Queue(4 * self._n_askers)

    def results(self) -> Iterator[BatchResult]:
        """The results, each as soon as it is there.

        Raises:
            ConfigError: two rows have one id.
            QapError: the engine cannot be started any more.
            Exception: whatever reading the rows raises.
        """
        work = [self._decode] * self._n_decoders + [self._ask] * self._n_askers
        threads = [threading.Thread(target=target, name="qap-batch", daemon=True) for target in work]
        for thread in threads:
            thread.start()
        left = len(threads)
        try:
            while left:
                found = self._results.get()
                if isinstance(found, BatchResult):
                    yield found
                    continue
                left -= 1
                if found.error is not None:
                    raise found.error
        finally:
            self._stop.set()

    # --- the threads ---

    def _put(self, to: queue.Queue[Any], what: Any) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                to.put(what, timeout=_TICK_S)
                return
        raise _StoppedError

    def _decode(self) -> None:
        error: BaseException | None = None
        try:
            for row in iter(self._next, None):
                made = self._made(row)
                self._put(self._results if isinstance(made, BatchResult) else self._requests, made)
        except _StoppedError:
            return
        except BaseException as err:
            error = err
        with contextlib.suppress(_StoppedError):
            with self._reading:
                self._n_decoders -= 1
                is_last = not self._n_decoders
            for _ in range(self._n_askers if is_last else 0):
                self._put(self._requests, _End())
            self._put(self._results, _End(error))

    def _next(self) -> Row | None:
        """The next row that is not known; None at the end."""
        with self._reading:
            for number, given in self._rows:
                row = read_row(given, number, self._defaults)
                if row.id in self._ids:
                    raise ConfigError(
                        f"id: expected another one for each row, got {row.id[:80]!r} again in row {number}; change it"
                    )
                self._ids.add(row.id)
                if row.id not in self._known:
                    return row
                if self._stop.is_set():
                    return None
        return None

    def _made(self, row: Row) -> _Request | BatchResult:
        """A row's request, its pictures decoded; or the result of a row that cannot be asked."""
        if row.error is not None:
            return failed(row, row.error)
        try:
            prepared = self._prepared(row)
            if row.images:
                prepared.images = list(row.images)
            self._preparer.load(prepared)
        except (QapError, RefusedError, OSError) as err:
            return failed(row, str(err))
        except UnicodeEncodeError:
            return failed(row, "expected Unicode text, got a lone surrogate; take it out")
        except Exception as err:  # a row of a million must not end the others
            return failed(row, f"unexpected {type(err).__name__}: {err}", 500)
        self._pixels.take(prepared.n_pixels)
        return _Request(row, prepared.body, prepared.n_pixels)

    def _prepared(self, row: Row) -> Prepared:
        body = dict(row.body)
        return self._preparer.chat(body) if row.path == CHAT_PATH else self._preparer.completion(body)

    def _ask(self) -> None:
        error: BaseException | None = None
        try:
            while not self._stop.is_set():
                try:
                    request = self._requests.get(timeout=_TICK_S)
                except queue.Empty:
                    continue
                if isinstance(request, _End):
                    break
                self._put(self._results, self._answer(request))
        except (_StoppedError, ClosedError):
            return
        except BaseException as err:
            error = err
        with contextlib.suppress(_StoppedError):
            self._put(self._results, _End(error))

    def _answer(self, request: _Request) -> BatchResult:
        try:
            status, data = self._engine.ask(request.row.path, request.body)
        except LostError as err:
            return failed(request.row, str(err), 500)
        finally:
            self._pixels.give(request.n_pixels)
            request.body = {}  # pictures are large
        try:
            return answered(request.row, status, data)
        except (ValueError, KeyError, TypeError, IndexError) as err:
            return failed(request.row, f"llama-server answered in another form ({err})", 500)
