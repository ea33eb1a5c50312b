"""Connections that wait: heads have a deadline, and whoever sends one is answered however many others wait.

Clients that take nothing of their answer are cut off.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from qap_gguf.serve.connections import waiting_room
from serve.conftest import serving

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
SECONDS = 1.0
LARGE, BLOCK = 1 << 26, 1 << 16


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, or to /slow when the body is there; /large is more than all buffers hold."""
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(LARGE // BLOCK):
            await send({"type": "http.response.body", "body": bytes(BLOCK), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """A server whose heads have a second, and of whose connections eight may wait."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        protocol = waiting_room(SECONDS, 8, SECONDS)
        config = uvicorn.Config(application, http=protocol, log_level="error", lifespan="off", timeout_keep_alive=60)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield sock.getsockname()
        server.should_exit = True
        thread.join()


def answered(raw: socket.socket, times: int = 1) -> bool:
    """Whether so many answers come; head and body may come apart."""
    found = b""
    while found.count(b"\r\n\r\nok") < times:
        block = raw.recv(1000)
        if not block:
            return False
        found += block
    return True


def ends_after(raw: socket.socket, drip: bytes = b"") -> float:
    """Seconds until the server hangs up; a byte of `drip` goes out every tenth of a second."""
    started, rest = time.monotonic(), list(drip)
    raw.settimeout(0.1)
    while time.monotonic() - started < 6 * SECONDS:
        try:
            if rest:
                raw.sendall(bytes([rest.pop(0)]))
            if raw.recv(1000) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - started


def test_a_head_has_a_deadline(address: tuple[str, int]) -> None:
    """Also when a byte comes now and then, at the first request and at the next of the same connection."""
    for drip in (b"", HEAD * 5):
        with socket.create_connection(address, 10) as raw:
            assert 0.5 * SECONDS < ends_after(raw, drip) < 4 * SECONDS
        with socket.create_connection(address, 10) as raw:
            raw.sendall(HEAD + b"\r\n")
            assert answered(raw)
            assert 0.5 * SECONDS < ends_after(raw, drip) < 4 * SECONDS


def test_a_request_has_its_own_time(address: tuple[str, int]) -> None:
    """A body may take longer than a head, and a connection that goes on asking is kept."""
    with socket.create_connection(address, 10) as raw:
        raw.sendall(b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\na")
        time.sleep(1.5 * SECONDS)
        raw.sendall(b"b")
        assert answered(raw)
        for _ in range(3):
            time.sleep(0.6 * SECONDS)
            raw.sendall(HEAD + b"\r\n")
            assert answered(raw)
        raw.sendall((HEAD + b"\r\n") * 3)  # several at once
        assert answered(raw, 3)


def test_the_oldest_goes(address: tuple[str, int]) -> None:
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(9)]
        waiting[-1].sendall(HEAD + b"\r\n")
        assert answered(waiting[-1])
        assert ends_after(waiting[0]) < 0.5 * SECONDS


@pytest.mark.parametrize(("waits", "gets_all"), [(2.5 * SECONDS, False), (0.0, True)])
def test_an_answer_that_nobody_reads(address: tuple[str, int], waits: float, gets_all: bool) -> None:
    with socket.create_connection(address, 10) as raw:
        raw.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        time.sleep(waits)
        n_bytes = 0
        with contextlib.suppress(ConnectionError):
            while block := raw.recv(1 << 20):
                n_bytes += len(block)
    assert (n_bytes >= LARGE) == gets_all, n_bytes


def test_a_crowd_that_asks_for_nothing() -> None:
    """400 connections send a byte now and then; everyone else is answered at once."""
    with serving("--ctx", "512", "--max-requests", "2") as server, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection(server.address, 10)) for _ in range(400)]
        for byte in HEAD[:5]:
            for raw in crowd:
                with contextlib.suppress(OSError):
                    raw.sendall(bytes([byte]))
            started = time.monotonic()
            assert server.get("/health")[0] == 200
            assert server.post({"prompt": "a", "max_tokens": 1}, "/v1/completions")[0] == 200
            assert time.monotonic() - started < 10
