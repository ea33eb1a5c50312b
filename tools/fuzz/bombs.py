"""What hostile clients send to a server, by kind: requests that are refused, and how connections are misused.

For tools/fuzz/crowd.py. A server's limits are those of LIMITS.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import json
import random
import socket
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

#: Options of `qap-gguf serve`.
LIMITS = ("--parallel", "4", "--ctx", "512", "--max-image-mb", "1", "--max-body-mb", "2")
CHAT, TEXT, TOKENS = "/v1/chat/completions", "/v1/completions", "/extras/tokenize"
_WEB = "http" + "://"
_TIMEOUT = 120.0
Address = tuple[str, int]


@dataclass(frozen=True)
class Request:
    """One request that a server refuses.

    Attributes:
        body: JSON, or bytes that are sent as they are.
        path: the route.
        kind: its Content-Type.
        length: what it announces as its length; None is the truth.
    """

    body: Any
    path: str = CHAT
    kind: str = "application/json"
    length: int | None = None

    @functools.cached_property
    def data(self) -> bytes:
        """The body's bytes."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def send(self, address: Address) -> str:
        """The answer's status."""
        data = self.data
        headers = {"Content-Type": self.kind, "Content-Length": str(len(data) if self.length is None else self.length)}
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=_TIMEOUT)) as connection:
            connection.request("POST", self.path, data, headers)
            reply = connection.getresponse()
            reply.read()
            return str(reply.status)


def ask(*urls: str, question: str = "What is this?", **fields: Any) -> dict[str, Any]:
    """The body of a question about pictures."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.append({"type": "text", "text": question})
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, "seed": 0, "max_tokens": 8, **fields}


def data_uri(data: bytes) -> str:
    """The bytes as a picture's URL."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


# --- grammars and schemas ---


def _doubling(n: int, form: str) -> str:
    rules = [f"r{i} ::= {form.format(f'r{i + 1}')}" for i in range(n)]
    return "\n".join(["root ::= r0", *rules, f'r{n} ::= "a"?'])


def _grammars() -> list[str]:
    repeated = ['root ::= "a"{5,2}', 'root ::= "a"{0,1000000000}', 'root ::= ("b" ("a" | "c"){ 3 , 2 })']
    nested = "root ::= " + "(" * 90_000 + '"a"' + ")" * 90_000
    marks = "root ::= a " + "#" * 40 + " a"
    doubling = [_doubling(40, form) for form in ("{0} {0}", "{0} | {0}", "({0} ({0}))", "{0} {0} | {0} {0}")]
    return [*repeated, nested, marks + "(", *doubling, 'root ::= "a" #'.ljust((1 << 18) + 1, "x"), "root ::= ("]


def _schemas() -> list[Any]:
    deep: Any = {"type": "string"}
    types: Any = {"type": "string"}
    for _ in range(70):
        deep = {"type": "array", "items": deep}
    for _ in range(12):
        types = {"type": ["object"] * 20, "properties": {"x": types}}
    defs: dict[str, Any] = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
    itself = {"type": "object", "properties": {"x": {"allOf": [{"$ref": "#/$defs/a"}]}}}
    return [
        deep,
        types,
        {"$ref": "#/$defs/a0", "$defs": {**defs, "a40": {"type": "string"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": itself}},
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(5000)}},
        {"type": "string", "minLength": 10**9},
        {"anyOf": [{"const": n} for n in range(20_000)]},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "^(?=a)b$"},
    ]


def _schema_request(schema: Any) -> Request:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return Request(ask(response_format=form))


# --- pictures ---


def _png(width: int, height: int, data: bytes) -> bytes:
    """A PNG whose header says so, whatever its data is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def _pictures() -> list[str]:
    buffer = io.BytesIO()
    Image.new("1", (6000, 6000)).save(buffer, "PNG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    bombs = [_png(60_000, 60_000, bytes(100_000)), _png(5000, 4000, bytes(10)), buffer.getvalue(), eps, b"hello"]
    return [*map(data_uri, bombs), data_uri(bytes(1_200_000))]


#: kind -> its requests
REQUESTS: dict[str, list[Request]] = {
    "grammars": [Request(ask(grammar=text)) for text in _grammars()],
    "schemas": [_schema_request(schema) for schema in _schemas()],
    "long texts": [
        Request(ask(question="<|im_end|>" * 150_000)),
        Request(ask(question="word " * 300_000)),
        Request({"prompt": "<|im_end|>" * 150_000, "max_tokens": 2}, TEXT),
        Request({"input": "<|im_start|><|im_end|>" * 60_000}, TOKENS),
        Request({"messages": [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(16_001)]}),
    ],
    "pictures": [Request(ask(url)) for url in _pictures()],
    "bad base64": [Request(ask("data:image/png;base64," + text)) for text in ("@@@@", "A", "A A A A " * 100_000)],
    "addresses": [
        Request(ask(url))
        for url in (
            _WEB + "127.0.0.1:1/a.png", _WEB + "169.254.169.254/latest", _WEB + "[::1]/", "file:///etc/passwd",
            "/etc/passwd", "ftp:" + "//a/b",
        )
    ],
    "content types": [
        Request(ask(), kind=kind) for kind in ("text/plain", "multipart/form-data", "application/octet-stream")
    ],
    "broken bodies": [
        Request(b'{"messages": ['), Request(b"[" * 100_000), Request(b"\xff\xfe"), Request(b"[]"), Request({}),
        Request(b'{"messages": [{"role": "user", "content": "\\ud800"}]}'), Request(ask(*["data:,x"] * 50)),
        Request(ask(n=2)), Request(ask(max_tokens=0)), Request(ask(stop=["a"] * 100)), Request(ask(prune={"x\ny": 1})),
    ],
    "large bodies": [
        Request(b'{"a": "' + b"x" * 3_000_000 + b'"}'), Request(b"", length=2**40),
        Request(b'{"a": [' + b"[]," * 600_000 + b"0]}"), Request(b'{"stop": [' + b"0," * 900_000 + b"0]}"),
    ],
}  # fmt: skip


# --- connections ---


def _head(n_bytes: int) -> bytes:
    lines = ("POST " + CHAT + " HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {n_bytes}")
    return "\r\n".join([*lines, "", ""]).encode()


def leave(address: Address, url: str, rng: random.Random) -> str:
    """A client that asks for a long answer about a picture and goes: at once, or after the first words."""
    endless = ask(url, stream=rng.random() < 0.7, cache_prompt=False, question="List the objects in row order.")
    data = json.dumps({**endless, "max_tokens": 300, "logit_bias": {"2": -100}}).encode()
    with contextlib.closing(socket.create_connection(address, _TIMEOUT)) as raw:
        raw.sendall(_head(len(data)) + data)
        if rng.random() < 0.5:
            return "left at once"
        raw.settimeout(rng.uniform(0.05, 1.0))
        with contextlib.suppress(TimeoutError):
            raw.recv(1000)
    return "left while it was answered"


@dataclass
class Held:
    """A connection that asks for nothing, or too slowly.

    Attributes:
        kind: idle, half a head, or a slow body.
        most: seconds after which its client goes.
    """

    kind: str
    most: float
    raw: socket.socket
    rest: list[bytes] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, address: Address, kind: str, most: float) -> Held:
        """A new one."""
        raw = socket.create_connection(address, _TIMEOUT)
        whole, drop_by_drop = {
            "idle connections": (b"", b""),
            "half heads": (b"", _head(9)[:-2]),
            "slow bodies": (_head(10_000), b"{" * 9000),
        }[kind]
        raw.sendall(whole)
        raw.setblocking(False)
        return cls(kind, most, raw, [bytes([byte]) for byte in drop_by_drop])

    def step(self) -> str | None:
        """Send a byte; how it ended, or None while it lasts."""
        try:
            if self.rest:
                self.raw.sendall(self.rest.pop(0))
            found = self.raw.recv(1000)
        except BlockingIOError:
            return "the client left" if time.monotonic() - self.begun > self.most else None
        except OSError:
            return "the server hung up"
        words = found.split()
        return words[1].decode() if len(words) > 1 else "the server hung up"


HELD = ("idle connections", "half heads", "slow bodies")
