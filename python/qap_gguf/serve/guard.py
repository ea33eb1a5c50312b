"""What stands in front of all routes: how many requests there are, the key, and the size of a request's body.

The body is read here, before anything looks at it, so that its size is bounded whether or not the client announces it.
Where there are too many requests, the one whose body has been coming for longest makes room.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

import anyio

from qap_gguf.serve.metrics import Metrics
from qap_gguf.serve.page import FILES
from qap_gguf.serve.problems import RefusedError, problem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_BODY_SECONDS = 60.0
_SLOW_SECONDS = 1.0  # after which a body that still comes makes room for others
#: What needs no key; the page's files are the same for everyone, and hold nothing of this server.
_OPEN = ("/health", *FILES)


class Guard:
    """ASGI middleware.

    Args:
        app: what stands behind it.
        metrics: counts the requests by status.
        api_key: bearer token that clients must send; None lets everyone in.
        max_body_bytes: largest body.
        max_requests: most requests at a time, those among them whose body still comes.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, api_key: str | None, max_body_bytes: int, max_requests: int = 256
    ) -> None:
        self._app, self._metrics, self._max_bytes = app, metrics, max_body_bytes
        self._max_requests, self._n_now = max_requests, 0
        self._coming: dict[anyio.CancelScope, float] = {}  # bodies, the oldest first, and since when
        self._token = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        self._n_now += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._n_now -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.add("requests_total", 1, f'status="{message["status"]}"')
            await send(message)

        try:
            if self._n_now > self._max_requests and not self._make_room():
                raise RefusedError(503, f"{self._n_now - 1} requests are open; come back later", "overloaded")
            self._check_key(scope)
            body = await self._read(scope, receive)
        except RefusedError as err:
            await problem(err)(scope, receive, counted)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # what comes now is the client's leaving
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, counted)

    def _make_room(self) -> bool:
        """End the body that has been coming for longest, unless all are new."""
        oldest = next(iter(self._coming), None)
        if oldest is None or anyio.current_time() - self._coming[oldest] < _SLOW_SECONDS:
            return False
        del self._coming[oldest]
        oldest.cancel()
        return True

    def _check_key(self, scope: Scope) -> None:
        if self._token is None or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            return
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(sent, self._token):
            raise RefusedError(401, "expected the server's API key as bearer token; send Authorization: Bearer KEY")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        body, n_bytes = bytearray(), 0
        # A client that is cut off while it still sends may not see why; a little too much is read and dropped.
        most = 4 * self._max_bytes
        too_large = RefusedError(413, f"body: expected at most {self._max_bytes} bytes; send smaller or fewer images")
        if announced.isdigit() and int(announced) > most:
            raise too_large
        with anyio.CancelScope(deadline=anyio.current_time() + _BODY_SECONDS) as limit:
            self._coming[limit] = anyio.current_time()
            try:
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise RefusedError(400, "body: the client went away")
                    n_bytes += len(message.get("body", b""))
                    if n_bytes <= self._max_bytes:
                        body += message.get("body", b"")
                    elif n_bytes > most:
                        raise too_large
                    if not message.get("more_body", False):
                        break
            finally:
                self._coming.pop(limit, None)
        if limit.cancelled_caught:
            raise RefusedError(
                408, f"body: expected all of it within {_BODY_SECONDS:g} seconds, or where many wait {_SLOW_SECONDS:g}"
            )
        if n_bytes > self._max_bytes:
            raise too_large
        return bytes(body)
