"""One model in several threads, Ctrl-C in the middle of things, and what is left in memory afterwards."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_grammar import LlamaGrammar

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from chat.conftest import content
from qap_gguf import _core
from qap_gguf.errors import NativeError, QapError

FILES = qap.packaged_model()
QUESTIONS = ["How many objects are there?", "What is in row 1, column 2?"]
LIST = "List the objects in row order."


@pytest.fixture(scope="module")
def llama() -> Iterator[llama_cpp.Llama]:
    llama = llama_cpp.Llama(str(FILES.model), n_ctx=2048, n_batch=2048, n_threads=1, n_threads_batch=1, verbose=False)
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def vlm(llama: llama_cpp.Llama) -> Iterator[qap.VisionModel]:
    with qap.VisionModel(FILES.mmproj, llama, n_threads=1) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def handler() -> Iterator[qap.ChatHandler]:
    """Over the same Llama as `vlm`."""
    with qap.ChatHandler(FILES.mmproj) as handler:
        yield handler


@pytest.fixture(scope="module")
def image(vlm: qap.VisionModel) -> qap.ImageEmbedding:
    return vlm.encode(FILES.sample)


@pytest.fixture(scope="module")
def answers(vlm: qap.VisionModel, image: qap.ImageEmbedding) -> dict[str, str]:
    return {q: vlm.generate([image, q], max_tokens=4) for q in (*QUESTIONS, LIST)}


def together(*work: Callable[[], Any]) -> list[Any]:
    """Results of functions that run in threads of their own."""
    found: list[Any] = [None] * len(work)

    def run(number: int) -> None:
        try:
            found[number] = work[number]()
        except BaseException as err:
            found[number] = err

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_answers_of_several_threads_wait_for_each_other(
    vlm: qap.VisionModel,
    handler: qap.ChatHandler,
    llama: llama_cpp.Llama,
    image: qap.ImageEmbedding,
    answers: dict[str, str],
) -> None:
    """A VisionModel and a handler over one Llama; whole answers, and streams that are read to their end."""

    def ask(question: str) -> str:
        return vlm.generate([image, question], max_tokens=4)

    def read(question: str) -> str:
        return "".join(vlm.generate([image, question], max_tokens=4, stream=True))

    def chat(question: str, stream: bool) -> Any:
        messages = [{"role": "user", "content": [image, question]}]
        return content(handler(llama=llama, messages=messages, temperature=0, max_tokens=4, stream=stream))

    asked = [*QUESTIONS, LIST] * 2
    found = together(
        lambda: [ask(q) for q in asked],
        lambda: [read(q) for q in asked],
        lambda: [chat(q, False) for q in asked],
        lambda: [chat(q, True) for q in asked],
        lambda: [vlm.encode(FILES.sample).n_tokens for _ in asked],
    )
    assert found == [[answers[q] for q in asked]] * 4 + [[144] * len(asked)]


def test_another_thread_waits_until_a_stream_is_closed(
    vlm: qap.VisionModel, image: qap.ImageEmbedding, answers: dict[str, str]
) -> None:
    for end in ("closed", "read", "forgotten"):
        stream: Any = vlm.generate([image, LIST], max_tokens=4, stream=True)
        next(stream)
        found: list[str] = []

        def ask(found: list[str] = found) -> None:
            found.append(vlm.generate([image, QUESTIONS[0]], max_tokens=4))

        other = threading.Thread(target=ask)
        other.start()
        time.sleep(0.2)
        assert found == []
        if end == "closed":
            stream.close()
        elif end == "read":
            list(stream)
        del stream
        other.join(60)
        assert found == [answers[QUESTIONS[0]]], end


def test_a_stream_that_nobody_reads_keeps_nobody_for_ever(
    vlm: qap.VisionModel, image: qap.ImageEmbedding, answers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Any] = []

    def begin() -> None:
        left.append(vlm.generate([image, LIST], stream=True))
        next(left[-1])

    together(begin)  # the reader's thread ends
    assert vlm.generate([image, QUESTIONS[0]], max_tokens=4) == answers[QUESTIONS[0]]
    with pytest.raises(QapError, match="newer one"):
        next(left[0])
    begin()
    monkeypatch.setattr(vlm.answers.turns, "patience_s", 0.1)
    assert together(lambda: vlm.generate([image, QUESTIONS[0]], max_tokens=4)) == [answers[QUESTIONS[0]]]
    with pytest.raises(QapError, match="newer one"):
        next(left[1])


def test_closing_the_language_model_in_the_middle_of_a_stream() -> None:
    with qap.ChatHandler(FILES.mmproj) as handler:
        llm = llama_cpp.Llama(
            str(FILES.model), chat_handler=handler, n_ctx=448, n_threads=1, n_threads_batch=1, verbose=False
        )
        messages: Any = [{"role": "user", "content": [FILES.sample, LIST]}]
        stream: Any = llm.create_chat_completion(messages, stream=True, max_tokens=20)
        next(stream)
        llm.close()
        with pytest.raises(QapError, match="closed"):
            list(stream)


def test_the_gil_is_free_during_native_work(
    vlm: qap.VisionModel, llama: llama_cpp.Llama, image: qap.ImageEmbedding
) -> None:
    """With a switch interval of minutes another thread runs only where the GIL is given up."""
    encoder = vlm._encoder
    pixels = np.zeros((192, 192, 3), np.uint8)
    (chunk,) = encoder._native.tokenize(_core.media_marker(), [pixels], False, True)
    params = qap.defaults.to_params(qap.PruneConfig(n_keep=18))
    cosines = _core.cosines(image.features, None, 1)
    total = qap.score(image.features).total
    kept = qap.select(total, 18)
    work: dict[str, Callable[[], Any]] = {
        "tokenize": lambda: encoder._native.tokenize("a" * 100, [], False, True),
        "encode": lambda: encoder._native.encode(chunk, True),
        "score": lambda: _core.score(image.features, None, params, None, 1),
        "cosines": lambda: _core.cosines(image.features, None, 1),
        "select": lambda: _core.select(total, cosines, 144, 18, "dpp", 0),
        "merge": lambda: _core.merge_average(image.features, cosines, kept),
        "eval": lambda: (llama.reset(), llama.eval([5, 6, 7])),  # type: ignore[no-untyped-call]
    }
    found: dict[str, bool] = {}
    interval = sys.getswitchinterval()
    for name, call in work.items():
        go = threading.Lock()
        ran: list[bool] = []
        go.acquire()

        def other(go: threading.Lock = go, ran: list[bool] = ran) -> None:
            with go:
                ran.append(True)

        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.02)
        sys.setswitchinterval(600)
        try:
            go.release()
            until = time.monotonic() + 10
            while not ran and time.monotonic() < until:  # short calls end before the other thread has woken up
                call()
            found[name] = bool(ran)
        finally:
            sys.setswitchinterval(interval)
        thread.join()
    vlm.forget()
    assert found == dict.fromkeys(work, True)


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_an_interrupt_stops_a_prefill(vlm: qap.VisionModel, image: qap.ImageEmbedding, answers: dict[str, str]) -> None:
    """The whole prompt is one batch; the error of the batch that was stopped stands after the interrupt."""
    long = "word " * 1800
    vlm.forget()
    started = time.perf_counter()
    vlm.generate([long], max_tokens=1)
    seconds = time.perf_counter() - started
    stopped = 0
    for part in (0.15, 0.3, 0.5):  # on a busy machine a signal may come early or late
        vlm.forget()
        timer = interrupt_after(part * seconds)
        try:
            vlm.generate([long], max_tokens=1)
            while timer.is_alive():
                time.sleep(0.01)
            time.sleep(0.1)
        except KeyboardInterrupt as err:
            stopped += isinstance(err.__cause__, NativeError)
        timer.join()
        assert vlm.generate([image, QUESTIONS[1]], max_tokens=4) == answers[QUESTIONS[1]]
    assert stopped > 0


def test_an_interrupt_stops_an_answer(
    handler: qap.ChatHandler, llama: llama_cpp.Llama, image: qap.ImageEmbedding, answers: dict[str, str]
) -> None:
    def chat(question: str, **settings: Any) -> Any:
        return handler(
            llama=llama, messages=[{"role": "user", "content": [image, question]}], temperature=0, **settings
        )

    endless = {"logit_bias": {llama.token_eos(): -1000.0}, "max_tokens": 1500}
    forever = {"grammar": LlamaGrammar.from_string('root ::= ("a" | "b") root', verbose=False), "max_tokens": 1500}
    for settings in (endless, forever, {**endless, "stream": True}, {**forever, "stream": True}):
        timer = interrupt_after(0.2)
        with pytest.raises(KeyboardInterrupt):
            content(chat(LIST, **settings))
        timer.join()
        assert content(chat(QUESTIONS[1], max_tokens=4)) == answers[QUESTIONS[1]]


def resident() -> int:
    """Bytes of memory that the process holds, without free pages that glibc keeps: those come in steps of megabytes."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")


@needs_proc
def test_images_leave_nothing_behind() -> None:
    """Each is new: encoded, pruned, answered, and gone from a cache that is too small for it."""
    rng = np.random.default_rng(0)
    cfg = qap.PruneConfig(n_keep=18, select="dpp")
    with qap.VisionModel(n_ctx=448, n_threads=1, cache=qap.EmbeddingCache(max_bytes=0)) as vlm:

        def ask(n: int) -> int:
            for _ in range(n):
                picture = rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)
                vlm.generate([picture, QUESTIONS[0]], prune=cfg, max_tokens=1)
            gc.collect()
            return resident()

        # Highest of some rounds: a kernel that takes idle pages back makes single figures smaller than they are.
        before = max(ask(20) for _ in range(6))
        grown = max(ask(20) for _ in range(6)) - before
    features = 144 * 256 * 4
    assert grown < 40 * features / 4  # a quarter of what keeping the features would cost


@needs_proc
def test_models_leave_nothing_behind() -> None:
    def use() -> int:
        with qap.ChatHandler(FILES.mmproj) as handler:
            llm = llama_cpp.Llama(
                str(FILES.model), chat_handler=handler, n_ctx=448, n_threads=1, n_threads_batch=1, verbose=False
            )
            messages: Any = [{"role": "user", "content": [FILES.sample, QUESTIONS[0]]}]
            llm.create_chat_completion(messages, max_tokens=1)
            llm.close()
        with qap.VisionModel(n_ctx=448, n_threads=1) as vlm:
            vlm.generate([FILES.sample, QUESTIONS[0]], max_tokens=1)
        gc.collect()
        return resident()

    before = max(use() for _ in range(8))  # the allocator grows for some uses, then no more in fifty
    assert max(use() for _ in range(8)) - before < FILES.mmproj.stat().st_size / 2
