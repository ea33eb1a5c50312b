"""Requests to llama-server on the loopback: one connection for each, which ends with it.

llama-server frees a request's slot when its connection closes, so leaving the block of :meth:`Upstream.send` is what
ends an answer that nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import h11

from qap_gguf.serve.problems import RefusedError

_BLOCK = 1 << 16


@dataclass
class Reply:
    """The head of an answer, and its body as it comes.

    Attributes:
        status: of HTTP.
        headers: names in lower case.
        blocks: the body; each block as soon as it is there.
    """

    status: int
    headers: Mapping[str, str]
    blocks: AsyncIterator[bytes] = field(repr=False)

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([block async for block in self.blocks])


class Upstream:
    """llama-server's address.

    Args:
        port: on 127.0.0.1.
        key: its API key.
    """

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key

    @contextlib.asynccontextmanager
    async def send(
        self, method: str, target: str, body: bytes = b"", content_type: str = "application/json"
    ) -> AsyncIterator[Reply]:
        """A request; the block has the head of the answer.

        Raises:
            RefusedError: llama-server is not there, or hangs up.
        """
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError as err:
            raise RefusedError(503, "the model is being loaded; come back later", "overloaded") from err
        connection = h11.Connection(h11.CLIENT)
        headers = [
            ("Host", "127.0.0.1"),
            ("Authorization", f"Bearer {self._key}"),
            ("Connection", "close"),
            ("Content-Length", str(len(body))),
        ]
        if body:
            headers.append(("Content-Type", content_type))
        try:
            writer.write(connection.send(h11.Request(method=method, target=target, headers=headers)) or b"")
            writer.write((connection.send(h11.Data(data=body)) or b"") if body else b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            head = await self._next(connection, reader)
            while isinstance(head, h11.InformationalResponse):
                head = await self._next(connection, reader)
            if not isinstance(head, h11.Response):
                raise RefusedError(502, "the server failed; its log says why")
            named = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
            yield Reply(head.status_code, named, self._blocks(connection, reader))
        except (ConnectionError, h11.RemoteProtocolError) as err:
            raise RefusedError(502, "the model's process ended the answer; ask again", "overloaded") from err
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):  # why it ended, or asyncio writes that nobody asked
                await writer.wait_closed()

    @staticmethod
    async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
        while True:
            event = connection.next_event()
            if event is not h11.NEED_DATA:
                return event
            connection.receive_data(await reader.read(_BLOCK))

    async def _blocks(self, connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while True:
            event = await self._next(connection, reader)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                return
