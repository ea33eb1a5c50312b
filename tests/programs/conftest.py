"""llama.cpp's own programs with our libmtmd in them: where they are, and a running server."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
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
        self._root = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._root + path, timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, answer)."""
        asked = urllib.request.Request(
            self._root + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=120) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as err:
            return err.code, json.load(err)

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
            with contextlib.suppress(OSError, urllib.error.URLError):
                server.get("/health")
                break
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
