"""What ordinary clients of OpenAI's API send and expect: nulls, usage of a stream, wrong types, a proxy between."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from typing import Any

import pytest
from PIL import Image

from qap_gguf.serve.request_fields import CHAT, SAMPLING
from serve.conftest import SAMPLE, URI, Served, ask
from serve.test_requests import client


def test_nulls_are_as_left_out(server: Served) -> None:
    """Every field that the request knows, of both routes; many clients send null for what nobody set."""
    chat = {*SAMPLING, *CHAT, "max_completion_tokens", "tools", "tool_choice", "functions", "function_call", "n"}
    chat |= {"response_format", "grammar", "logprobs", "top_logprobs", "logit_bias", "stream_options", "model"}
    chat |= {"chat_template_kwargs", "min_tokens"}
    for fields, path, body in (
        (chat, "/v1/chat/completions", ask(URI)),
        ({*SAMPLING, "grammar", "logprobs", "suffix", "echo", "best_of", "n", "model"}, "/v1/completions", {
            "prompt": "row 1, column", "temperature": 0, "max_tokens": 2}),
    ):  # fmt: skip
        assert {"temperature", "top_p", "top_k", "min_p", "stream", "repeat_penalty", "seed", "stop"} <= fields
        status, expected = server.post(body, path)
        assert status == 200
        for field in sorted(fields - set(body)):
            status, found = server.post({**body, field: None}, path)
            assert status == 200, (field, found)
            assert found["choices"] == expected["choices"], field
        for field in ("temperature", "max_tokens"):
            assert server.post({**body, field: None}, path)[0] == 200, field
        status, found = server.post(body | dict.fromkeys(fields - set(body)), path)
        assert found["choices"] == expected["choices"]


def test_usage_of_a_stream(server: Served) -> None:
    """The counts are those of the same answer at once: ended by the model, by a stop text and by its length."""
    endless: dict[str, Any] = {"question": "List the objects in row order.", "logit_bias": {"2": -100}, "max_tokens": 9}
    with client(server) as api:
        for body in (ask(URI), ask(URI, stop="us"), ask(URI, **endless), ask(question="Hello")):
            whole = api.chat.completions.create(model="any", **body)
            chunks = list(
                api.chat.completions.create(model="any", stream=True, stream_options={"include_usage": True}, **body)
            )
            assert chunks[-1].choices == []
            assert counts(chunks[-1].usage) == counts(whole.usage)
            assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks[:-1])
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
            assert text == whole.choices[0].message.content
        without = list(api.chat.completions.create(model="any", stream=True, **ask(URI)))
        assert all(chunk.choices and chunk.usage is None for chunk in without)
        with api.chat.completions.stream(model="any", stream_options={"include_usage": True}, **ask(URI)) as stream:
            assert stream.get_final_completion().usage.prompt_tokens == 72 + 21
        plain = {"model": "any", "prompt": "row 1, column", "max_tokens": 3, "temperature": 0}
        pieces = list(api.completions.create(stream=True, stream_options={"include_usage": True}, **plain))
        assert counts(pieces[-1].usage) == counts(api.completions.create(**plain).usage)


def counts(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def test_raw_base64_is_told_about_data_uris(server: Served) -> None:
    for data in (SAMPLE.read_bytes(), jpeg()):
        status, answer = server.post(ask(base64.b64encode(data).decode()))
        assert status == 400
        assert "data URI, got base64" in answer["error"]["message"]


def jpeg() -> bytes:
    """Its base64 begins like a path: /9j/."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", ""])
def test_a_wrong_content_type_is_named(server: Served, kind: str) -> None:
    status, answer = server.post(json.dumps(ask(URI)).encode(), headers={"Content-Type": kind})
    assert status == 400
    assert "Content-Type: application/json" in answer["error"]["message"]
    assert (kind or "got") in answer["error"]["message"]


def test_streams_pass_a_proxy(server: Served) -> None:
    data = json.dumps(ask(URI, stream=True)).encode()
    request = urllib.request.Request(
        server.url + "/v1/chat/completions", data, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.read().endswith(b"data: [DONE]\n\n")
