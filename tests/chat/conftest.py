"""One language model for the tests of the chat handler; it keeps all logits, which logprobs need."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import llama_cpp

import qap_gguf as qap

QUESTION = "What is in row 1, column 2?"


@pytest.fixture(scope="session")
def packaged() -> qap.PackagedModel:
    return qap.packaged_model()


@pytest.fixture(scope="session")
def uri(packaged: qap.PackagedModel) -> str:
    """The packaged picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(packaged.sample.read_bytes()).decode()


@pytest.fixture(scope="module")
def llama(packaged: qap.PackagedModel) -> Iterator[llama_cpp.Llama]:
    llama = llama_cpp.Llama(
        str(packaged.model), n_ctx=448, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def handler(packaged: qap.PackagedModel) -> Iterator[qap.ChatHandler]:
    with qap.ChatHandler(packaged.mmproj) as handler:
        yield handler


def user(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one user message."""
    return [{"role": "user", "content": list(parts)}]


def image_url(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def content(completion: Any) -> Any:
    """The text of a completion, or of its chunks."""
    if isinstance(completion, dict):
        return completion["choices"][0]["message"]["content"]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in completion)
