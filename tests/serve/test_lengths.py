"""Texts that cannot fit the context are refused by their length: fast, and without holding the model."""

from __future__ import annotations

import json
import time
from typing import Any

import llama_cpp
import pytest

import qap_gguf as qap
from qap_gguf.errors import ConfigError
from qap_gguf.language.prompt_length import PromptLimit
from serve.conftest import URI, Served, ask
from serve.test_requests import connected, picture

SECONDS = 5.0  # measured before: 94.6 and 27.7


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], "max_tokens": 2}


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "special tokens": ("/v1/chat/completions", chat("<|im_end|>" * 150_000)),
    "special tokens among words": ("/v1/chat/completions", chat("<|im_end|> a" * 130_000)),
    "many messages": ("/v1/chat/completions", chat(*["a"] * 16_001)),
    "many parts": ("/v1/chat/completions", ask(URI) | chat("a") | {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}] * 20_000}]}),
    "words": ("/v1/chat/completions", chat("word " * 300_000)),
    "one letter": ("/v1/chat/completions", chat("a" * 1_500_000)),
    "a prompt": ("/v1/completions", {"prompt": "<|im_end|>" * 150_000, "max_tokens": 2}),
    "tokens": ("/extras/tokenize", {"input": "<|im_end|>" * 150_000}),
    "a count": ("/extras/tokenize/count", {"input": "<|im_start|><|im_end|>" * 60_000}),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), LONG.values(), ids=LONG.keys())
def test_long_texts_are_refused_fast(server: Served, path: str, body: dict[str, Any]) -> None:
    started = time.monotonic()
    status, answer = server.post(body, path)
    assert time.monotonic() - started < SECONDS
    assert status == 400
    assert "n_ctx" in answer["error"]["message"]
    assert answer["error"]["code"] == "context_length_exceeded"


def test_pictures_that_cannot_fit_are_not_encoded(server: Served) -> None:
    """Four of them have 576 tokens, the context has 512."""
    urls = [picture(311, 300 + i) for i in range(4)]
    status, answer = server.post(ask(*urls, prune=None))
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    told = [server.post(ask(url, cache_prompt=False))[1]["prune"]["n_cached"] for url in (urls[0], urls[0])]
    assert told == [0, 1]


def test_others_are_answered_meanwhile(server: Served) -> None:
    """Also where the clients have left."""
    data = json.dumps(LONG["special tokens"][1]).encode()
    for _ in range(4):
        with connected(server, len(data)) as raw:
            raw.sendall(data)
    started = time.monotonic()
    assert server.post(ask(URI))[0] == 200
    assert time.monotonic() - started < SECONDS


def test_nothing_is_refused_that_fits() -> None:
    """The bound is below the tokens of any text, and above the context for each of the long ones."""
    llm = llama_cpp.Llama(str(qap.packaged_model().model), n_ctx=256, verbose=False)
    limit, n_ctx = PromptLimit(llm), int(llm.n_ctx())
    texts = [
        "a" * 200,
        "<|im_end|>" * 60,
        "<|im_start|>a<|im_end|>" * 50,
        " " * 300,
        "word " * 80,
        "\u00e9" * 200,
        "\U0001f436" * 150,
    ]
    texts += ["<|im_end|" * 100, "\n" * 500, "<unk>" * 80, "row 1, column 2 " * 20]
    for text in (part * repeat for part in texts for repeat in (1, 10)):
        tokens = len(llm.tokenize(text.encode(), add_bos=False, special=True))
        assert 0 <= limit.at_least(text) <= tokens, text
    assert limit.at_least("<|im_end|>" * 700) == 700
    assert limit.at_least("<|im_end|>" * 700, 300) == 301  # counting ends there
    with pytest.raises(ConfigError, match=f"at least {n_ctx + 1};"):
        limit.check("<|im_end|>" * 700)
    limit.check_turns([["a"], [""]] * n_ctx)
    with pytest.raises(ConfigError, match=f"{n_ctx + 1} messages"):
        limit.check_turns([["a"], []] * (n_ctx + 1))
    llm.close()


def test_the_package_refuses_them_too() -> None:
    with qap.VisionModel(n_threads=1, n_ctx=256) as vlm:
        started = time.monotonic()
        with pytest.raises(ConfigError, match="n_ctx"):
            vlm.generate(["<|im_end|>" * 150_000])
        assert time.monotonic() - started < SECONDS
        question = [qap.packaged_model().sample, "How many objects are there?"]
        assert vlm.generate(question, prune=None, max_tokens=2) == "four"
