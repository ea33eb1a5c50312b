"""llama.cpp's own programs with our libmtmd in them: where they are, and a running server."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap
import server_answers

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
        return server_answers.call(self._port, path)[1]

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, answer) of a POST."""
        return server_answers.call(self._port, path, body)

    def ask(self, question: str, **settings: Any) -> tuple[int, Any]:
        """A question about the packaged picture."""
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
        content = [image, {"type": "text", "text": question}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, **settings}
        return self.post("/v1/chat/completions", body)


@contextlib.contextmanager
def running(folder: Path, *words: str, **env: str) -> Iterator[Server]:
    """A server for a `with` block; `env` are variables of its environment."""
    program("llama-server")
    with server_answers.running(folder, "--ctx-size", "2048", *words, **env) as port:
        yield Server(port)
