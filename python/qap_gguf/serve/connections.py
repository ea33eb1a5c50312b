"""Connections that ask for nothing, or take nothing: they take nobody's place, and they do not last.

uvicorn counts every open connection against ``limit_concurrency``, and waits without end for the head of a request
whose bytes come one by one. Here a head has a deadline, counted from the start of the connection or from the end of its
last answer, whatever comes meanwhile; and where too many connections wait, the one that has waited longest goes. An
answer that nobody reads would wait without end as well: a client that takes nothing of it for a while is cut off.
Requests are counted by :mod:`qap_gguf.serve.guard`, so ``limit_concurrency`` stays unset.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def waiting_room(head_seconds: float = 10.0, max_waiting: int = 256, write_seconds: float = 30.0) -> type[H11Protocol]:
    """A protocol for ``uvicorn.Config(http=...)``, of one server.

    Args:
        head_seconds: how long the head of a request may take.
        max_waiting: most connections that wait for one.
        write_seconds: how long a client may take nothing of what is ready for it.
    """
    waiting: OrderedDict[Connection, None] = OrderedDict()

    class Connection(H11Protocol):
        """One connection; it is in `waiting` while no request of it is worked on."""

        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._has_request():
                self._forget()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self._has_request() and not self.transport.is_closing():
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            self._is_read()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._is_read()
            self._unread = self.loop.call_later(write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._is_read()

        def _is_read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _has_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            self._forget()
            waiting[self] = None
            self._deadline = self.loop.call_later(head_seconds, self._hang_up)
            if len(waiting) > max_waiting:
                next(iter(waiting))._hang_up()

        def _forget(self) -> None:
            waiting.pop(self, None)
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _hang_up(self) -> None:
            self._forget()
            self.transport.close()

    return Connection
