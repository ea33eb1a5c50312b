"""With embeddings and the KV prefix reused, answers are those of a run that starts from nothing, bit for bit."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import llama_cpp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import fresh_answers
import qap_gguf as qap
from fresh_answers import FIELDS, N_CTX, PICTURES, QUESTIONS, ROOM, SYSTEMS, FreshProcesses, answer, some_sequence

configs = st.none() | st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FIELDS.items()})
asked = st.tuples(
    st.lists(st.integers(0, len(PICTURES) - 1), max_size=2).map(tuple),
    st.sampled_from(QUESTIONS),
    st.sampled_from(SYSTEMS),
    configs,
)
Asked = tuple[tuple[int, ...], str, str | None, qap.PruneConfig | None]


def run(vlm: qap.VisionModel, what: Asked) -> tuple[str, bytes, qap.GenerationStats]:
    """The answer, the logits of its first token, and the statistics."""
    numbers, question, system, cfg = what
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": [*(PICTURES[i] for i in numbers), question]})
    answer = vlm.chat(messages, prune=cfg, max_tokens=4, stream=True)
    logits = vlm.last_logits().tobytes()
    return "".join(answer), logits, answer.stats


@pytest.fixture(scope="module")
def reusing() -> Iterator[qap.VisionModel]:
    with qap.VisionModel(n_ctx=N_CTX, n_threads=1) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def starting() -> Iterator[qap.VisionModel]:
    with qap.VisionModel(n_ctx=N_CTX, n_threads=1) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def fresh() -> Iterator[FreshProcesses]:
    with FreshProcesses() as processes:
        yield processes


@pytest.fixture(scope="module")
def caching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qap.VisionModel]:
    """All caches on: the KV prefix, two of three pictures in memory, all of them in a folder."""
    cache = qap.EmbeddingCache(ROOM, tmp_path_factory.mktemp("kept"))
    with qap.VisionModel(n_ctx=N_CTX, n_threads=1, cache=cache) as vlm:
        yield vlm


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=st.lists(asked, min_size=2, max_size=4))
def test_any_sequence(caching: qap.VisionModel, fresh: FreshProcesses, sequence: list[fresh_answers.Asked]) -> None:
    """Text and logits are those of a new process that answers this question alone, with no cache."""
    for what in sequence:
        text, digest, stats = answer(caching, what)
        assert (text, digest) == fresh.answer(what), (what, stats)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_conversation(caching: qap.VisionModel, fresh: FreshProcesses) -> None:
    """The same for sequences in which little changes from one question to the next, so that much is reused."""
    rng, reused = random.Random(1), 0
    for what in (what for _ in range(4) for what in some_sequence(rng)):
        text, digest, stats = answer(caching, what)
        assert (text, digest) == fresh.answer(what), (what, stats)
        reused += stats.n_reused
    assert reused > 0
    assert caching.cache.stats.hits > 0


def test_what_is_reused(reusing: qap.VisionModel) -> None:
    """Cells taken over: none, the text in front of the image, the image too."""
    reusing.forget()
    n_encodes = reusing.n_encodes

    def count(text: str) -> int:
        return len(reusing.language_model.tokenize(text.encode(), add_bos=False, special=True))

    cfg, front, between = qap.PruneConfig(n_keep=36), count("<|im_start|>user\n"), count("\n")
    steps: list[tuple[Asked, int]] = [
        (((0,), QUESTIONS[0], None, cfg), 0),
        (((0,), QUESTIONS[0], None, cfg), front + 36),
        (((0,), QUESTIONS[1], None, cfg), front + 36),
        (((1,), QUESTIONS[1], None, cfg), front),
        (((1,), QUESTIONS[1], None, cfg.replace(alpha=0.0)), front),
        (((1,), QUESTIONS[1], None, cfg.replace(alpha=0.0, n_keep=35)), front),
        (((1,), QUESTIONS[1], None, None), front),
        (((1,), QUESTIONS[2], None, None), front + 144),
        (((1, 0), QUESTIONS[2], None, None), front + 144),
        (((1, 0), QUESTIONS[0], None, None), front + 144 + between + 144),
        (((1, 0), QUESTIONS[0], SYSTEMS[1], None), 0),
        (((), QUESTIONS[0], None, None), 0),
        (((), QUESTIONS[0], None, None), 0),  # one step: it is evaluated for its logits
    ]
    found = [run(reusing, what)[2].n_reused for what, _ in steps]
    assert found == [n for _, n in steps]
    assert reusing.n_encodes == n_encodes + 2  # both pictures once


def test_selections_that_follow_the_question_are_not_confused(reusing: qap.VisionModel) -> None:
    cfg = qap.PruneConfig(n_keep=36, semantic="text", alpha=1.0)
    image = reusing.encode(PICTURES[0])
    kept = [reusing.prune(image, cfg, question).indices.tolist() for question in QUESTIONS[:2]]
    assert kept[0] != kept[1]
    run(reusing, ((0,), QUESTIONS[0], None, cfg))
    assert run(reusing, ((0,), QUESTIONS[1], None, cfg))[2].n_reused < 36


def test_others_use_the_same_llama(starting: qap.VisionModel) -> None:
    """Text, and a stock handler's image, between two of our answers; also a second VisionModel."""
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    files = qap.packaged_model()
    llm = llama_cpp.Llama(str(files.model), n_ctx=N_CTX, n_threads=1, n_threads_batch=1, verbose=False)
    what: Asked = ((0,), QUESTIONS[1], None, None)
    starting.forget()
    expected = run(starting, what)[:2]
    stock: Any = Llava15ChatHandler(clip_model_path=str(files.mmproj), verbose=False)
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": files.sample.as_uri()}]}]
    with qap.VisionModel(files.mmproj, llm, n_threads=1) as one, qap.VisionModel(files.mmproj, llm, n_threads=1) as two:
        assert run(one, what)[:2] == expected
        assert run(two, what)[2].n_reused > 144
        ids = llm.input_ids[: llm.n_tokens].copy()
        stock(llama=llm, messages=messages, max_tokens=1)
        llm.input_ids[: len(ids)] = ids  # the stock handler leaves old numbers where its image is
        llm.n_tokens = max(llm.n_tokens, len(ids))
        text, logits, stats = run(one, what)
        assert (text, logits, stats.n_reused) == (*expected, 0)
        llm.create_completion(list(range(5, 200)), max_tokens=1)
        text, logits, stats = run(one, what)
        assert (text, logits, stats.n_reused) == (*expected, 0)
        llm._ctx.kv_cache_clear()  # type: ignore[no-untyped-call]
        text, logits, stats = run(two, what)
        assert (text, logits, stats.n_reused) == (*expected, 0)
    llm.close()


def test_a_failure_leaves_nothing_behind(reusing: qap.VisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    what: Asked = ((0,), QUESTIONS[1], None, None)
    expected = run(reusing, what)[:2]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reusing._language, "prefill", fail)
        with pytest.raises(KeyboardInterrupt):
            run(reusing, what)
    text, logits, stats = run(reusing, what)
    assert (text, logits, stats.n_reused) == (*expected, 0)
