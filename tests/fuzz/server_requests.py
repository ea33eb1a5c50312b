"""Requests to the server as strangers make them: right ones, edited anywhere, with odd settings, or damaged bytes.

A case is plain JSON: a path, and a body or bytes; "@name" stands for a picture. An answer must be a 200 that is whole,
or a 4xx whose body says in one line what is wrong; in a stream whose first chunk was sent, an event says it. The server
is a process of its own, which must live on.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
from collections.abc import Callable
from typing import Any, ClassVar

from PIL import Image

import qap_gguf as qap
from fuzz.surfaces import ODD, Case, change, limited, replace_at, some_path

#: What settings may hold, beside anything.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 0.7, 100), "top_p": (0, 1, 0.5), "min_p": (0, 1), "top_k": (0, 1, 40), "seed": (0, -1),
    "max_tokens": (1, 3, 10**9), "max_completion_tokens": (2,), "min_tokens": (0, 3), "stop": ("a", ["house"], []),
    "stream": (True, False), "logprobs": (True, False, 1), "top_logprobs": (0, 3), "n": (1, 2), "user": ("me",),
    "model": ("any", ""), "presence_penalty": (-2, 2), "frequency_penalty": (0.5,), "repeat_penalty": (1.1, 0),
    "mirostat_mode": (0, 1, 2), "mirostat_tau": (0, 5), "mirostat_eta": (0.1,), "logit_bias": ({"5": 3}, {"a": 1}, {}),
    "logit_bias_type": ("input_ids", "tokens"), "grammar": ('root ::= "a" | "b"', "root ::= [0-9]+", "root ::= x", ""),
    "response_format": (
        {"type": "json_object"}, {"type": "text"}, {"type": "json_object", "schema": {"enum": ["a", "b"]}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}},
    ),
    "tools": ([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], []),
    "tool_choice": ("auto", "none", "required", {"type": "function", "function": {"name": "f"}}),
    "functions": ([{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}],),
    "function_call": ("auto", {"name": "f"}, {"name": "g"}),
    "prune": (None, {}, {"n_keep": 9}, {"keep_ratio": 0.1, "select": "dpp"}, {"semantic": "text", "alpha": "dynamic"}),
    "suffix": ("b",), "echo": (True,), "best_of": (1,),
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "/v1/completions": {"prompt": "row 1, column", "max_tokens": 3},
    "/extras/tokenize": {"input": "hello"},
    "/extras/tokenize/count": {"input": "hello"},
    "/extras/detokenize": {"tokens": [5, 6, 7]},
}
TEXTS = (
    "How many objects are there?", "", " ", "\u00e9\U0001f436", "<image>", "<__media__>", "<|im_end|>", "{{ 7 }}",
    "two\nlines", "a" * 3000,
)  # fmt: skip


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def _saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pictures() -> dict[str, str]:
    """Name of a picture in a case -> what is sent for it."""
    sample = qap.packaged_model().sample.read_bytes()
    return {
        "sample": _uri(sample),
        "gif": _uri(_saved(Image.new("P", (3, 5), 7), "gif"), "gif"),
        "grey": _uri(_saved(Image.new("LA", (1, 900), (9, 99)), "png")),
        "half": _uri(sample[: len(sample) // 2]),
        "large": _uri(_saved(Image.new("L", (5001, 5000)), "png")),
        "text": "data:text/plain,hello",
        "web": "http" + "://127.0.0.1:9/a.png",
        "file": "file:///etc/passwd",
    }


class Requests:
    """Requests to a server.

    Args:
        host, port: where it listens.
        alive: whether its process lives.
    """

    name: ClassVar[str] = "requests"

    def __init__(self, host: str, port: int, alive: Callable[[], bool]) -> None:
        self._host, self._port, self._alive = host, port, alive
        self._pictures = pictures()

    def make(self, rng: random.Random) -> Case:
        """A request; mostly a chat about a picture or two."""
        path = "/v1/chat/completions" if rng.random() < 0.85 else rng.choice(list(OTHERS))
        body: Any = _chat(rng) if path.startswith("/v1/chat") else json.loads(json.dumps(OTHERS[path]))
        for key in rng.sample(list(SETTINGS), rng.choice((0, 1, 1, 2, 4))):
            body[key] = rng.choice(SETTINGS[key]) if rng.random() < 0.8 else rng.choice(ODD)
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            edit = change(rng)
            body = replace_at(body, some_path(rng, body), edit)
        case: dict[str, Any] = {"path": path, "body": body}
        if rng.random() < 0.08:
            case |= {"at": rng.random(), "bytes": rng.choice(("", "00", "ff", "7b", "22", "5b" * 3000))}
        return case

    def _named(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pictures.get(value[1:], value) if value.startswith("@") else value
        if isinstance(value, list):
            return [self._named(item) for item in value]
        return {key: self._named(item) for key, item in value.items()} if isinstance(value, dict) else value

    def run(self, case: Case) -> str:
        """Send it."""
        data = json.dumps(self._named(case["body"])).encode()
        if "at" in case:
            at, new = int(case["at"] * len(data)), bytes.fromhex(case["bytes"])
            data = data[:at] + (new + data[at + len(new) :] if new else b"")
        connection = http.client.HTTPConnection(self._host, self._port, timeout=60)
        try:
            with limited():
                connection.request("POST", case["path"], data, {"Content-Type": "application/json"})
                response = connection.getresponse()
                status, kind, text = response.status, response.getheader("Content-Type", ""), response.read().decode()
        finally:
            connection.close()
        if not self._alive():
            raise AssertionError("the server's process ended")
        if status == 200:
            return _whole(text) if kind.startswith("text/event-stream") else _answered(text)
        if not 400 <= status < 500:
            raise AssertionError(f"expected 200 or 4xx, got {status}: {text[:400]}")
        _reason(json.loads(text))
        return "refused"


def _chat(rng: random.Random) -> dict[str, Any]:
    messages: list[Any] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(TEXTS)})
    for turn in range(rng.choice((1, 1, 1, 3))):
        parts: list[Any] = [
            {"type": "image_url", "image_url": {"url": "@" + rng.choice(("sample",) * 12 + tuple(pictures()))}}
            for _ in range(rng.choice((0, 1, 1, 2)) if turn == 0 else 0)
        ]
        parts.append({"type": "text", "text": TEXTS[0] if rng.random() < 0.6 else rng.choice(TEXTS)})
        rng.shuffle(parts)
        content: Any = parts if len(parts) > 1 or rng.random() < 0.5 else parts[0]["text"]
        messages.append({"role": "assistant" if turn == 1 else "user", "content": content})
    chat = {"messages": messages, "max_tokens": rng.choice((1, 3)), "prune": {"n_keep": rng.choice((4, 36, 144))}}
    return chat | ({"stream": True} if rng.random() < 0.3 else {})


def _reason(body: Any) -> None:
    error = body["error"]
    if set(error) != {"message", "type", "param", "code"} or error["type"] != "invalid_request_error":
        raise AssertionError(f"expected an error of the client's in OpenAI's form, got {body}")
    if not error["message"].strip() or "\n" in error["message"] or "Traceback" in error["message"]:
        raise AssertionError(f"expected one line, got {error['message']!r}")


def _answered(text: str) -> str:
    found = json.loads(text)
    if not ({"choices", "tokens", "count", "text"} & set(found)):
        raise AssertionError(f"expected an answer, got {text[:400]}")
    return "answered"


def _whole(text: str) -> str:
    """Events that end in [DONE], or in one that says what is wrong."""
    events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    if events[-1] == "[DONE]":
        for event in events[:-1]:
            if "choices" not in json.loads(event):
                raise AssertionError(f"expected a chunk, got {event[:400]}")
        return "streamed"
    _reason(json.loads(events[-1]))
    return "refused in the stream"
