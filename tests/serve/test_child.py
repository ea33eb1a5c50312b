"""llama-server behind the guard: nobody else reaches it, both end together, a slot is free when nobody waits for it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.serve import child
from serve.conftest import URI, Served, ask, find_program_or_skip, serving
from serve.test_requests import connected, picture

#: An answer that does not end by itself before the context is full.
ENDLESS: dict[str, Any] = {
    "question": "List the objects in row order.", "max_tokens": 100_000, "logit_bias": {"2": -100},
}  # fmt: skip
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def words_of(pid: int) -> list[str]:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is not only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_alive(pid)


def port_of(server: Served) -> int:
    words = words_of(server.llama_server())
    return int(words[words.index("--port") + 1])


@LINUX
def test_llama_server_answers_nobody_else(server: Served) -> None:
    """It listens on the loopback, and asks for a key that no command line tells."""
    words = words_of(server.llama_server())
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert "--api-key" not in words
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/props"), ("GET", "/metrics")):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=30)) as raw:
            raw.request(method, path, json.dumps(ask()) if method == "POST" else None)
            assert raw.getresponse().status == 401, path


@pytest.mark.parametrize(
    "path",
    [
        "/", "/props", "/slots", "/slots/0?action=save", "/tools", "/cors-proxy", "/lora-adapters", "/v1/messages",
        "/v1/responses", "/v1/embeddings", "/completion", "/chat/completions", "/infill", "/apply-template",
        "/tokenize",
        "/v1/stream", "/models", "/v1/audio/transcriptions", "/v1/chat/completions/control", "/rerank",
    ],
)  # fmt: skip
def test_its_other_routes_are_not_there(server: Served, path: str) -> None:
    for status, answer in (server.get(path), server.post(ask(), path)):
        assert status == 404
        assert answer["error"]["type"] == "invalid_request_error"


def test_a_route_that_was_asked_for() -> None:
    with serving("--ctx", "512", "--route", "/apply-template", "--route", "/v1/messages", "--api-key", "k") as server:
        key = {"Authorization": "Bearer k"}
        assert server.post(ask(), "/apply-template")[0] == 401
        status, answer = server.post(ask(), "/apply-template", key)
        assert (status, answer["prompt"].count("What is in row 1")) == (200, 1)
        status, answer = server.post({"max_tokens": 4, **ask()}, "/v1/messages", key)
        assert (status, answer["type"]) == (200, "message")
        assert server.get("/slots", key)[0] == 404
        assert server.get("/props", key)[0] == 404


@contextlib.contextmanager
def started(log: Path) -> Iterator[Served]:
    """A server that may end within the block."""
    find_program_or_skip()
    command = [sys.executable, "-m", "qap_gguf", "serve", "--port", "0", "--threads", "1", "--ctx", "512"]
    with log.open("w") as err, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("qap-gguf serves")
            yield Served("", process)
        finally:
            process.kill()


@LINUX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_llama_server_ends_with_the_guard(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path / "log") as server:
        inner = server.llama_server()
        server.process.send_signal(number)
        assert server.process.wait(20) in (-number, 128 + number)
        assert gone(inner)
    assert (tmp_path / "log").read_text().strip() == ""


@LINUX
def test_the_guard_ends_with_llama_server(tmp_path: Path) -> None:
    with started(tmp_path / "log") as server:
        os.kill(server.llama_server(), signal.SIGSEGV)
        assert server.process.wait(20) == 1
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 1, lines
    assert "llama-server ended" in lines[0]
    assert "signal 11" in lines[0]


def slots_free(server: Served) -> bool:
    """Whether an answer about a picture comes at once: both slots would be busy for minutes otherwise."""
    started = time.monotonic()
    status, answer = server.post(ask(URI))
    return status == 200 and answer["choices"][0]["message"]["content"] == "house" and time.monotonic() - started < 10


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream: bool) -> None:
    with serving("--ctx", "16384", "--parallel", "1", "--n-keep", "72") as server:
        body = json.dumps(ask(URI, stream=stream, **ENDLESS)).encode()
        for _ in range(3):
            with connected(server, len(body)) as raw:
                raw.sendall(body)
                time.sleep(0.5)
        assert slots_free(server)


def test_a_request_has_its_time() -> None:
    with serving("--ctx", "16384", "--parallel", "1", "--n-keep", "72", "--max-seconds", "2") as server:
        started = time.monotonic()
        status, answer = server.post(ask(URI, **ENDLESS))
        assert (status, answer["error"]["code"]) == (504, "timeout")
        body = json.dumps(ask(URI, stream=True, **ENDLESS)).encode()
        with connected(server, len(body), "Connection: close") as raw:
            raw.sendall(body)
            raw.settimeout(30)
            text = b""
            while block := raw.recv(1 << 16):
                text += block
        assert 4 <= time.monotonic() - started < 15
        last = text.strip().rpartition(b"data: ")[2].split(b"\r\n")[0]
        assert json.loads(last)["error"]["code"] == "timeout"
        assert slots_free(server)


def test_two_answers_at_a_time(server: Served) -> None:
    """The first word of the second comes while the first one is still being made."""
    body = json.dumps(ask(URI, stream=True, **ENDLESS)).encode()
    with connected(server, len(body)) as raw:
        raw.sendall(body)
        assert b"200 OK" in raw.recv(200)
        assert slots_free(server)


def test_a_loop_that_stands_still_is_started_again() -> None:
    """The process is stopped, which no grammar of ours can do so surely."""
    with serving("--ctx", "512", env={"QAP_SERVE_STALLED_SECONDS": "4"}) as server:
        inner = server.llama_server()
        os.kill(inner, signal.SIGSTOP)
        status, answer = server.post(ask(URI))
        assert (status, answer["error"]["type"]) == (502, "server_error")
        assert gone(inner)
        for _ in range(100):
            if server.post(ask())[0] == 200:
                break
            time.sleep(0.1)
        assert server.post(ask(URI, prune={"n_keep": 72}))[1]["choices"][0]["message"]["content"] == "house"
        assert server.metric("restarts_total") == 1


@pytest.mark.parametrize("word", ["--host", "--api-key", "--mmproj", "-c", "--port=8"])
def test_options_that_serve_sets(word: str) -> None:
    find_program_or_skip()
    done = subprocess.run(
        [sys.executable, "-m", "qap_gguf", "serve", "--", word, "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"got {word.partition('=')[0]}, which serve sets itself" in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_that_llama_server_does_not_know() -> None:
    find_program_or_skip()
    done = subprocess.run(
        [sys.executable, "-m", "qap_gguf", "serve", "--ctx", "512", "--", "--no-such-option"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "llama-server ended while it loaded the model" in done.stderr
    assert "--no-such-option" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_package_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(qap, "__path__", [str(tmp_path)])
    with pytest.raises(ConfigError, match="run make programs"):
        child.find_program()


@pytest.mark.parametrize("semantic", ["text", "clip_text"])
def test_scores_that_look_at_the_prompt(server: Served, semantic: str) -> None:
    status, answer = server.post(ask(URI, prune={"semantic": semantic}))
    assert status == 400
    assert "looks at the prompt" in answer["error"]["message"]


@pytest.mark.parametrize(("mode", "n_kept"), [("stretch", 144), ("pad", 48)])
def test_how_pictures_are_resized(mode: str, n_kept: int) -> None:
    """A picture three times as wide as high is a third of a square, the rest of which is padding."""
    with serving("--ctx", "512", "--keep-ratio", "1", "--resize", mode) as server:
        answer = server.post(ask(picture(300, 100)))[1]
    assert [row["n_kept"] for row in answer["prune"]["images"]] == [n_kept]


def test_a_resize_that_there_is_not() -> None:
    find_program_or_skip()
    files = qap.packaged_model()
    words = ["-m", str(files.model), "--mmproj", str(files.mmproj)]
    with contextlib.closing(child.Child(words, {"QAP_RESIZE": "wide"})) as found, pytest.raises(ModelFileError):
        found.start()
    assert any("expected auto, stretch or pad, got 'wide'" in line for line in found._lines)


def test_what_was_kept_is_told(server: Served) -> None:
    def told(**fields: Any) -> Any:
        status, answer = server.post(ask(URI, **fields))
        assert status == 200, answer
        return answer["prune"]

    found = told(prune={"n_keep": 17, "indices": True}, cache_prompt=False)
    (row,) = found["images"]
    assert (row["n_tokens"], row["n_kept"], row["grid"], row["content"]) == (144, 17, [12, 12], [0, 0, 12, 12])
    with qap.VisionModel(n_threads=1, n_ctx=512) as vlm:
        image = vlm.encode(qap.packaged_model().sample)
        assert row["indices"] == list(vlm.prune(image, qap.PruneConfig(n_keep=17)).indices)
    assert "indices" not in told(prune={"n_keep": 18})["images"][0]
    assert told(prune=None)["images"] == [{"n_tokens": 144, "n_kept": 144}]
    answer = server.post(ask(URI, URI, prune={"n_keep": 5}))[1]
    assert [row["n_kept"] for row in answer["prune"]["images"]] == [5, 5]
    assert "prune" not in server.post(ask())[1]
