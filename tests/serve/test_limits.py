"""The server's limits, both sides of each: bodies, images of a request, files, pixels, requests at a time, time."""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from PIL import Image
from starlette.requests import Request

from qap_gguf.errors import ConfigError
from qap_gguf.serve import guard
from qap_gguf.serve.app import Application
from qap_gguf.serve.metrics import Metrics
from qap_gguf.serve.requests import Prepared
from qap_gguf.serve.settings import ServeSettings
from qap_gguf.serve.upstream import Upstream
from serve.conftest import SAMPLE, URI, Served, ask, serving
from serve.test_requests import WEB

BODY, IMAGE, PIXELS, IMAGES = 2 * 2**20, 2**20, 25_000_000, 8


def padded(body: dict[str, Any], n_bytes: int) -> bytes:
    """The request with white space after it, which JSON allows."""
    return json.dumps(body).encode().ljust(n_bytes)


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chunked(server: Served, body: bytes, block: int = 2**16) -> int:
    """Status of a request whose length was not announced."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    blocks = (body[i : i + block] for i in range(0, len(body), block))
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    connection.request("POST", "/v1/chat/completions", blocks, headers, encode_chunked=True)
    with contextlib.closing(connection):
        return connection.getresponse().status


def test_bytes_of_a_body(server: Served) -> None:
    """Announced and not."""
    for n_bytes, status in ((BODY, 200), (BODY + 1, 413)):
        body = padded(ask(URI), n_bytes)
        assert server.post(body)[0] == status
        assert chunked(server, body) == status
    assert server.post(b"", headers={"Content-Length": str(2**60)})[0] == 413


def test_images_of_a_request(server: Served) -> None:
    for n_images, status in ((IMAGES, 200), (IMAGES + 1, 400)):
        found, answer = server.post(ask(*[URI] * n_images, prune={"n_keep": 4}))
        assert found == status, answer


def test_bytes_of_an_image(server: Served) -> None:
    """What follows the end of a PNG is nobody's business, but counts."""
    whole = SAMPLE.read_bytes()
    for n_bytes, status in ((IMAGE, 200), (IMAGE + 1, 400)):
        found, answer = server.post(ask(uri(whole.ljust(n_bytes, b"\0"))))
        assert found == status, answer


def test_pixels_of_a_picture(server: Served) -> None:
    for height, status in ((PIXELS // 10_000, 200), (PIXELS // 10_000 + 1, 400)):
        buffer = io.BytesIO()
        Image.new("L", (10_000, height)).save(buffer, "png")
        found, answer = server.post(ask(uri(buffer.getvalue())))
        assert found == status, answer


def test_tokens_of_a_prompt(server: Served) -> None:
    """The context has 512 places; one is kept for the answer."""

    def send(n: int) -> tuple[int, Any]:
        return server.post(ask(question="a" + " a" * (n - 1), max_tokens=1))

    around = send(1)[1]["usage"]["prompt_tokens"] - 1
    status, answer = send(511 - around)
    assert (status, answer["usage"]["prompt_tokens"]) == (200, 511)
    status, answer = send(512 - around)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_stop_texts(server: Served) -> None:
    for n_stops, status in ((16, 200), (17, 400)):
        assert server.post(ask(URI, stop=[f"stop {i}" for i in range(n_stops)]))[0] == status


def test_grammars(server: Served) -> None:
    def nested(depth: int) -> str:
        return "root ::= " + "(" * depth + '"a"' + ")" * depth

    def long(n: int) -> str:
        return 'root ::= "a" #'.ljust(n, "x")

    for good, bad, words in ((nested(200), nested(201), "nested"), (long(2**18), long(2**18 + 1), "characters")):
        status, answer = server.post(ask(URI, grammar=good))
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "a")
        status, answer = server.post(ask(URI, grammar=bad))
        assert status == 400
        assert words in answer["error"]["message"]


@pytest.mark.parametrize("depth", [5, 50, 150, 300, 450, 480, 50_000])
def test_nested_bodies(server: Served, depth: int) -> None:
    """JSON objects within lists within objects, in every field that takes some: an answer or a reason."""
    text = '{"a": [' * depth + '"x"' + "]}" * depth
    fields = {
        "ignored": text,
        "prune": text,
        "tools": f'[{{"type": "function", "function": {text}}}]',
        "functions": f"[{text}]",
        "tool_choice": text,
        "response_format": f'{{"type": "json_object", "schema": {text}}}',
        "logit_bias": text,
        "stop": text,
        "grammar": text,
    }
    for name, value in fields.items():
        body = f'{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, "{name}": {value}}}'
        status, answer = server.post(body.encode())
        assert status in (200, 400), (name, answer)
    for message in (text, f'{{"role": "user", "content": {text}}}', f'{{"role": "user", "content": [{text}]}}'):
        assert server.post(f'{{"messages": [{message}]}}'.encode())[0] == 400
    extra = f'{{"role": "user", "content": "a", "name": {text}}}'
    assert server.post(f'{{"messages": [{extra}], "max_tokens": 1}}'.encode())[0] in (200, 400)


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "application/json; charset=utf-16"],
)
def test_bodies_of_another_kind(server: Served, kind: str) -> None:
    """UTF-16 is found out by its bytes, as RFC 4627 has it; what is no JSON by its name is not read."""
    text = json.dumps(ask(URI))
    status, answer = server.post(text.encode("utf-16" if "16" in kind else "utf-8"), headers={"Content-Type": kind})
    assert status == (200 if "16" in kind else 400), answer


def test_what_is_no_http(server: Served) -> None:
    """Each gets a 4xx, or the connection ends; the next request is answered."""
    for data in (
        b"\x16\x03\x01" * 50,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
    ):
        with socket.create_connection(server.address, 10) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(data)
            found = raw.recv(100)
            assert found == b"" or found.startswith(b"HTTP/1.1 4"), found
    assert server.post(ask(URI))[0] == 200


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    """Two requests at a time, and URLs are fetched."""
    with serving("--ctx", "512", "--max-requests", "2", "--allow-urls") as served:
        yield served


def test_requests_at_a_time(small: Served) -> None:
    """Two answers are in the making or wait, the third is told to come back; then there is room again."""
    endless = ask(URI, question="List the objects in row order.", stream=True, max_tokens=300, logit_bias={"2": -100})
    data = json.dumps(endless).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: a", "Content-Type: application/json")
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""])
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            raw = stack.enter_context(socket.create_connection(small.address, 30))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            raw.sendall(head.encode() + data)
        assert wait_for(small, 2) == 2
        status, answer = small.post(ask(URI))
        assert status == 503
        assert answer["error"]["code"] == "overloaded"
        assert answer["error"]["type"] == "server_error"
    assert wait_for(small, 0) == 0
    assert small.post(ask(URI))[0] == 200


def wait_for(server: Served, n: int) -> int:
    """Until the server has `n` requests, for at most ten seconds; how many it has."""
    for _ in range(200):
        found = int(server.get("/health")[1]["requests"])
        if found == n:
            break
        time.sleep(0.05)
    return found


def test_urls_that_are_fetched_never_lead_inside(small: Served) -> None:
    """A host on this machine that would answer is not asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as host:
        port = host.getsockname()[1]
        host.settimeout(0.1)

        def listen() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError), host.accept()[0] as connection:
                    asked.append(connection.recv(100))

        done = threading.Event()
        thread = threading.Thread(target=listen)
        thread.start()
        names = ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "127.1")
        found = {name: small.post(ask(f"{WEB}{name}:{port}/a.png")) for name in names}
        done.set()
        thread.join()
    assert {status for status, _ in found.values()} == {400}, found
    words = [answer["error"]["message"] for _, answer in found.values()]
    assert all("public address" in text or "cannot resolve" in text for text in words), words
    assert asked == []
    for url in ("file:///etc/passwd", "/etc/passwd", "ftp:" + "//127.0.0.1/a"):
        assert small.post(ask(url))[0] == 400


@pytest.mark.parametrize(("seconds", "status"), [(0.0, 200), (0.3, 408)])
def test_time_for_a_body(monkeypatch: pytest.MonkeyPatch, seconds: float, status: int) -> None:
    """Within the time a body in pieces is read, later it is a 408; the application behind sees only the first."""
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.2)
    sent: list[Any] = []
    pieces = [b"ab", b"c", b""]

    async def receive() -> Any:
        if len(pieces) == 1:
            await anyio.sleep(seconds)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"abc"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def call() -> None:
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        await guard.Guard(app, Metrics(), None, 3)(scope, receive, send)

    anyio.run(call)
    assert sent[0]["status"] == status


@pytest.mark.parametrize(("seconds", "statuses"), [(0.1, [408, 200, 200]), (30.0, [200, 200, 503])])
def test_slow_bodies_make_room(monkeypatch: pytest.MonkeyPatch, seconds: float, statuses: list[int]) -> None:
    """Two requests at a time, two bodies that have not come after 0.3 s, and a third client: the first makes room."""
    monkeypatch.setattr(guard, "_SLOW_SECONDS", seconds)
    found: dict[int, int] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def call(front: guard.Guard, number: int) -> None:
        async def receive() -> Any:
            await anyio.sleep(0.6 if number < 2 else 0.0)
            return {"type": "http.request", "body": b"a", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                found[number] = message["status"]

        await front({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)

    async def all_of_them() -> None:
        front = guard.Guard(app, Metrics(), None, 9, max_requests=2)
        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(call, front, number)
                await anyio.sleep(0.01 if number == 0 else 0.3)

    anyio.run(all_of_them)
    assert [found[number] for number in range(3)] == statuses


def test_values_of_a_body(server: Served) -> None:
    """Fields that nobody reads cost time too; the context has 512 tokens."""
    most = 100_000 + 8 * 512
    around = sum(map(json.dumps(ask(ignored=[0])).count, ",[{"))
    for n, status in ((most - around, 200), (most - around + 1, 400)):
        found, answer = server.post(ask(ignored=[0] * (n + 1)))
        assert found == status, answer
    assert f"at most {most} commas" in answer["error"]["message"]


class Slow:
    """Checks requests slowly, and notes how many of a kind at a time."""

    def __init__(self) -> None:
        self.now: collections.Counter[str] = collections.Counter()
        self.most: collections.Counter[str] = collections.Counter()

    def chat(self, body: dict[str, Any]) -> Prepared:
        self.note(body["user"])
        raise ConfigError("checked")

    def tokens(self, text: str) -> list[int]:
        self.note("large text" if len(text) > 100 else "text")
        return []

    def note(self, kind: str) -> None:
        self.now[kind] += 1
        self.most[kind] = max(self.most[kind], self.now[kind])
        time.sleep(0.1)
        self.now[kind] -= 1


def test_large_requests_are_checked_one_at_a_time() -> None:
    """Those that are large by their pictures alone are not large."""
    slow: Any = Slow()
    app = Application(Upstream(1, ""), slow, ServeSettings(), Metrics())
    kinds = {"small": ask(), "picture": ask("data:image/png;base64," + "A" * 100_000), "large": ask(user="a" * 100_000)}

    async def send_one(kind: str) -> None:
        data = json.dumps({**kinds[kind], "user": kind, "stop": kinds[kind].get("user")}).encode()
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}

        async def receive() -> Any:
            return {"type": "http.request", "body": data}

        async def send(_message: Any) -> None:
            pytest.fail("expected no answer")

        with pytest.raises(ConfigError, match="checked"):
            await app.chat(Request(scope, receive), scope, receive, send)

    async def tokenize(text: str) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": json.dumps({"input": text}).encode()}

        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
        assert (await app.tokenize(Request(scope, receive))).status_code == 200

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for kind in list(kinds) * 4:
                tasks.start_soon(send_one, kind)
            for text in ("a", "a" * 100_000) * 3:
                tasks.start_soon(tokenize, text)

    anyio.run(main)
    assert slow.most == {"small": 4, "picture": 4, "large": 1, "text": 3, "large text": 1}
