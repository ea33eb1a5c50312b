"""llama-server hangs up in the middle: one refusal, and no future whose reason nobody asked for."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from typing import Any

import pytest

from qap_gguf.serve.problems import RefusedError
from qap_gguf.serve.upstream import Upstream


def test_a_reset_is_one_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    # it asks for the reason, but the garbage collector may come to the future first
    monkeypatch.delattr(asyncio.StreamReaderProtocol, "__del__")
    complaints: list[dict[str, Any]] = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        at_once = struct.pack("ii", 1, 0)  # a reset in place of an end
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    async def ask(port: int) -> None:
        with pytest.raises(RefusedError, match="the model's process ended the answer"):
            async with Upstream(port, "key").send("GET", "/"):
                pass

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with server:
            await ask(server.sockets[0].getsockname()[1])
        for _ in range(3):
            gc.collect()
            await asyncio.sleep(0)

    asyncio.run(main())
    assert complaints == []
