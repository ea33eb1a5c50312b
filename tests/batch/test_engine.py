"""llama-server ends: it is started again, rows are asked again, and one that takes it down takes no other with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import qap_gguf as qap
from batch.conftest import SMALL
from qap_gguf.batch import BatchModel
from qap_gguf.batch.engine import ClosedError, Engine, LostError
from qap_gguf.errors import ModelFileError, NativeError


class FakeChild:
    """Answers as llama-server does, in threads; a request with "poison" in it ends it, and "slow" takes a while."""

    key = "k"

    def __init__(self, starts: int = 100) -> None:
        self.port, self.starts, self.n_spawned = 0, starts, 0
        self.asked: list[str] = []
        self._server: ThreadingHTTPServer | None = None
        self._open: list[socket.socket] = []

    @property
    def status(self) -> int | None:
        return None if self._server is not None else -9

    def spawn(self) -> None:
        self.n_spawned += 1
        child = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(b"ok")

            def do_POST(self) -> None:
                child._open.append(self.connection)
                text = self.rfile.read(int(self.headers["Content-Length"])).decode()
                child.asked.append(text)
                if "slow" in text:
                    time.sleep(0.3)
                if "poison" in text:
                    child.end()
                self._reply(text.encode())

            def _reply(self, data: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # cut off
                    super().handle()

        if self.n_spawned > self.starts:
            return
        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self._server = server

    def wait_until_ready(self) -> None:
        if self._server is None:
            raise ModelFileError("llama-server ended while it loaded the model")

    def end(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        while self._open:
            connection = self._open.pop()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.shutdown()
        server.server_close()

    terminate = end

    def anonymous(self) -> int:
        return 0

    def last_words(self) -> str:
        return "signal 9"


@pytest.fixture
def fake() -> Iterator[tuple[FakeChild, Engine]]:
    child = FakeChild()
    engine = Engine(child)  # type: ignore[arg-type]
    engine.start()
    yield child, engine
    engine.close()


def test_a_request_that_ends_it_takes_no_other_with_it(fake: tuple[FakeChild, Engine]) -> None:
    child, engine = fake
    answers: dict[str, Any] = {}

    def ask(name: str) -> None:
        try:
            answers[name] = json.loads(engine.ask("/", {"name": name})[1])["name"]
        except LostError as err:
            answers[name] = str(err)

    names = ["poison", *(f"slow {i}" for i in range(4))]
    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers.pop("poison") == "the model's process ended 3 times while it answered this row"
    assert answers == {name: name for name in names[1:]}
    assert engine.n_restarts == 3
    assert sum("poison" in text for text in child.asked) == 3


def test_one_that_always_ends(fake: tuple[FakeChild, Engine]) -> None:
    _, engine = fake
    for _ in range(4):
        with pytest.raises(LostError, match="ended 3 times"):
            engine.ask("/", {"name": "poison"})
    with pytest.raises(NativeError, match="12 times without an answer between"):
        engine.ask("/", {"name": "poison"})


def test_one_that_does_not_start_again() -> None:
    engine = Engine(FakeChild(starts=1))  # type: ignore[arg-type]
    engine.start()
    with pytest.raises(ModelFileError, match="while it loaded"):
        engine.ask("/", {"name": "poison"})
    engine.close()
    engine = Engine(FakeChild(starts=0))  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match="while it loaded"):
        engine.start()
    engine.close()


def test_closing_lets_go_of_those_who_wait(fake: tuple[FakeChild, Engine]) -> None:
    _, engine = fake
    found: list[BaseException] = []

    def ask() -> None:
        try:
            while True:
                engine.ask("/", {"name": "slow"})
        except ClosedError as err:
            found.append(err)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    engine.close()
    thread.join(10)
    assert len(found) == 1


def killed(model: BatchModel) -> None:
    """Kill its llama-server."""
    process = model.engine._child._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.usefixtures("program")
def test_the_real_one_is_killed_while_it_answers() -> None:
    sample = qap.packaged_model().sample
    rows = [{"id": f"{i}", "image": sample} for i in range(12)]
    with BatchModel(**SMALL) as model:
        found = []
        for result in model.run(rows):
            found.append(result)
            if len(found) in (2, 6):
                killed(model)
        assert sorted(int(result.id) for result in found) == list(range(12))
        assert {(result.answer, result.error) for result in found} == {("house", None)}
        assert model.engine.n_restarts in (1, 2)  # the second one may come after the last answer
        child = model.engine._child
    assert child.status is None  # closed
