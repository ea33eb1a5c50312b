"""The life of a VisionModel and of its answers: closing, abandoned and interleaved generators, shared models."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import llama_cpp
import pytest

import leak_check
import qap_gguf as qap
from qap_gguf.errors import ConfigError, NativeError, QapError

QUESTION = "How many objects are there?"
LIST = "List the objects in row order."


def test_closing_twice_and_use_after_it(packaged: qap.PackagedModel) -> None:
    vlm = qap.VisionModel(n_threads=1)
    image = vlm.encode(packaged.sample)
    vlm.close()
    vlm.close()
    uses: list[Any] = [
        lambda: vlm.encode(packaged.sample),
        lambda: vlm.prune(image),
        lambda: vlm.generate([image, QUESTION]),
        lambda: vlm.generate([image, QUESTION], prune=None),
        lambda: vlm.generate([image, QUESTION], stream=True),
        lambda: vlm.chat([{"role": "user", "content": "a"}]),
        lambda: vlm.why_not_prunable,
        vlm.last_logits,
    ]
    for use in uses:
        with pytest.raises(QapError, match="closed"):
            use()
    assert image.n_tokens == 144  # what was read out stays


def test_closing_in_the_middle_of_an_answer(packaged: qap.PackagedModel) -> None:
    vlm = qap.VisionModel(n_threads=1)
    pieces = vlm.generate([packaged.sample, LIST], stream=True, max_tokens=30)
    next(pieces)
    vlm.close()
    with pytest.raises(QapError, match="closed"):
        list(pieces)


def test_a_model_that_is_forgotten_frees_itself(packaged: qap.PackagedModel) -> None:
    for _ in range(3):
        vlm = qap.VisionModel(n_threads=1)
        pieces = vlm.generate([packaged.sample, LIST], stream=True)
        next(pieces)
        del vlm, pieces
        gc.collect()


def test_an_abandoned_answer_does_not_touch_the_next(vlm: qap.VisionModel, sample: qap.ImageEmbedding) -> None:
    expected = vlm.generate([sample, QUESTION])
    abandoned = vlm.generate([sample, LIST], stream=True)
    next(abandoned)
    assert vlm.generate([sample, QUESTION]) == expected
    del abandoned
    closed = vlm.generate([sample, LIST], stream=True)
    next(closed)
    closed.close()
    assert list(closed) == []
    assert vlm.generate([sample, QUESTION]) == expected


def test_interleaved_answers_are_an_error_not_a_mixture(
    vlm: qap.VisionModel, sample: qap.ImageEmbedding, answer: str
) -> None:
    first = vlm.generate([sample, LIST], stream=True)
    next(first)
    second = vlm.generate([sample, QUESTION], stream=True)
    with pytest.raises(QapError, match="newer one"):
        next(first)
    assert "".join(second) == answer


def test_a_refused_question_leaves_the_model_usable(
    vlm: qap.VisionModel, sample: qap.ImageEmbedding, answer: str
) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError):
            vlm.generate([sample, "word " * 3000])
        assert vlm.generate([sample, QUESTION]) == answer


def test_logits_before_any_question() -> None:
    with qap.VisionModel(n_threads=1) as vlm, pytest.raises(NativeError, match="evaluate text first"):
        vlm.last_logits()


def test_threads_share_a_model(vlm: qap.VisionModel, packaged: qap.PackagedModel, answer: str) -> None:
    """Encodes wait for each other; whole answers do too."""
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(vlm.generate([packaged.sample, QUESTION]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [answer] * 4


def test_a_llama_of_the_caller_stays_the_callers(packaged: qap.PackagedModel, answer: str) -> None:
    llama = llama_cpp.Llama(model_path=str(packaged.model), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    with qap.VisionModel(packaged.mmproj, llama, n_threads=1) as vlm:
        assert vlm.language_model is llama
        assert vlm.generate([packaged.sample, QUESTION]) == answer
    assert llama.tokenize(b"hello")  # still open
    with qap.VisionModel(packaged.mmproj, llama, n_threads=1) as vlm:
        image = vlm.encode(packaged.sample)
        pieces = vlm.generate([image, LIST], stream=True)
        next(pieces)
        llama.close()
        for use in (lambda: next(pieces), lambda: vlm.encode(packaged.sample), lambda: vlm.generate([image, "a"])):
            with pytest.raises(QapError, match="closed by its owner"):
                use()
    with pytest.raises(ConfigError, match="closed"):
        qap.VisionModel(packaged.mmproj, llama)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_the_leak_check_runs_the_encoder_for_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/fuzz/leak_check.py would mean nothing if a cache answered."""
    monkeypatch.setattr(leak_check, "WARM", 3)
    _, passes = leak_check.growth(6, answers=True)
    assert passes == 6


@pytest.mark.parametrize("kind", ["vocab_only", "embedding"])
def test_a_llama_that_cannot_generate(packaged: qap.PackagedModel, kind: str) -> None:
    settings: dict[str, Any] = {kind: True}
    llama = llama_cpp.Llama(model_path=str(packaged.model), n_ctx=512, verbose=False, **settings)
    with pytest.raises(ConfigError, match=kind):
        qap.VisionModel(packaged.mmproj, llama)
    llama.close()
