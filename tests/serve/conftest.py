"""One server in a child process for the tests of it, and a client; both over loopback. Needs `make programs`."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)
pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

import qap_gguf as qap
from qap_gguf.errors import ConfigError
from qap_gguf.serve.child import find_program

SAMPLE = qap.packaged_model().sample
URI = "data:image/png;base64," + base64.b64encode(SAMPLE.read_bytes()).decode()
#: Options of a server for made-up requests: short answers, small limits, all features.
FUZZED = ("--ctx", "512", "--max-tokens", "8", "--max-image-mb", "1", "--max-body-mb", "2")
QUESTION = "What is in row 1, column 2?"


def ask(*images: str, question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    parts.append({"type": "text", "text": question})
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 4, **fields}


@dataclass
class Served:
    """A server in a child process."""

    url: str
    process: subprocess.Popen[str]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.rpartition("/")[2].partition(":")
        return host, int(port)

    def post(
        self, body: Any, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and parsed answer; `body` is JSON, or bytes to send as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **(headers or {})}, method="POST"
        )
        return _answer(request)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and parsed answer."""
        return _answer(urllib.request.Request(self.url + path, headers=headers or {}))

    def metric(self, name: str) -> float:
        """A counter of /metrics, all its labels added."""
        lines = str(self.get("/metrics")[1]).splitlines()
        found = [line.rsplit(" ", 1) for line in lines if line.startswith((f"qap_{name} ", f"qap_{name}{{"))]
        assert found, name
        return sum(float(value) for _, value in found)

    def llama_server(self) -> int:
        """Process id of its llama-server."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def resident(self) -> int:
        """Bytes of memory that it and its llama-server hold."""
        pages = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (self.process.pid, self.llama_server())
        ]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def _answer(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as err:
        with err:
            status, text = err.code, err.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def find_program_or_skip() -> None:
    """Skip where llama-server was not built."""
    try:
        find_program()
    except ConfigError as err:
        pytest.skip(str(err))


@contextlib.contextmanager
def serving(*options: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """`qap-gguf serve` on a free port with the packaged model; skips where llama-server was not built."""
    find_program_or_skip()
    environment = {**os.environ, **(env or {})}
    command = [sys.executable, "-m", "qap_gguf", "serve", "--port", "0", "--threads", "1", "--json", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            while not lines or lines[-1] != "}\n":
                line = process.stdout.readline()
                assert line, process.communicate()[1][-4000:]
                lines.append(line)
            yield Served(json.loads("".join(lines))["url"], process)
            assert process.poll() is None, "the server ended"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                _, log = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                _, log = process.communicate()
                raise
    assert "Traceback" not in log, log[-4000:]
    assert process.returncode in (0, -signal.SIGINT, 130), (process.returncode, log[-2000:])


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    with serving("--n-keep", "72", "--ctx", "512", "--max-image-mb", "1", "--max-body-mb", "2") as served:
        yield served
