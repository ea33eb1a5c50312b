"""llama.cpp's own programs with our libmtmd in them: where they are, and a running server."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap

PROGRAMS = Path(next(iter(qap.__path__))) / "bin"
PICTURE = base64.b64encode(qap.packaged_model().sample.read_bytes()).decode()


def program(name: str) -> str:
    """Path of a program, or a skip with the command that builds it."""
    path = PROGRAMS / name
    if not path.is_file():
        pytest.skip(f"{name} was not built; run make programs")
    return str(path)


class Server:
    """A llama-server with the packaged model on a port of its own."""

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str) -> Any:
        """The answer to a GET."""
        return self._call("GET", path)[1]

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, answer) of a POST."""
        return self._call("POST", path, json.dumps(body))

    def _call(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

    def ask(self, question: str, **settings: Any) -> tuple[int, Any]:
        """A question about the packaged picture."""
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
        content = [image, {"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, **settings}
        return self.post("/v1/chat/completions", body)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(folder: Path, *words: str, **env: str) -> Iterator[Server]:
    """A server for a `with` block; `env` are variables of its environment."""
    files, port, log = qap.packaged_model(), _free_port(), folder / "server.log"
    command = [program("llama-server"), "-m", str(files.model), "--mmproj", str(files.mmproj)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--ctx-size", "2048", *words]
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT)
    server = Server(port)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(OSError):
                if server.get("/health").get("status") == "ok":
                    break
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
