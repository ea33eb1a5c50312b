"""What clients ask: the openai package, streaming and not, pruning per request, and every kind of refusal."""

from __future__ import annotations

import base64
import io
import json
import socket
import urllib.request
import zlib
from typing import Any

import pytest
from PIL import Image

from serve.conftest import SAMPLE, URI, Served, ask, serving

openai = pytest.importorskip("openai")


def client(server: Served) -> Any:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_the_openai_client(server: Served) -> None:
    with client(server) as api:
        assert [model.id for model in api.models.list()] == ["tiny-llava-Q4_0"]
        whole = api.chat.completions.create(model="any", **ask(URI))
        assert whole.choices[0].message.content == "house"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.prompt_tokens == 72 + 21
        chunks = list(api.chat.completions.create(model="any", stream=True, **ask(URI)))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "house"
        assert chunks[-1].choices[0].finish_reason == "stop"
        text = api.completions.create(model="any", prompt="row 1, column", max_tokens=2, temperature=0)
        assert text.choices[0].text
        pieces = api.completions.create(model="any", prompt="row 1, column", max_tokens=2, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text


def test_what_the_openai_client_can_ask_besides(server: Served) -> None:
    schema = {"type": "object", "properties": {"thing": {"enum": ["house", "tree"]}}, "required": ["thing"]}
    tool = {"type": "function", "function": {"name": "name_it", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with client(server) as api:
        made = api.chat.completions.create(model="m", **ask(URI, max_tokens=30, response_format=form))
        assert json.loads(made.choices[0].message.content)["thing"] in ("house", "tree")
        called = api.chat.completions.create(
            model="m",
            tools=[tool],
            tool_choice={"type": "function", "function": {"name": "name_it"}},
            **ask(URI, max_tokens=30),
        )
        (call,) = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["thing"] in ("house", "tree")
        told = api.chat.completions.create(model="m", logprobs=True, top_logprobs=2, **ask(URI))
        first = told.choices[0].logprobs.content[0]
        assert first.token == "house"
        assert first.top_logprobs[0].logprob == first.logprob
        short = ask(URI, max_completion_tokens=1, question="List the objects in row order.")
        del short["max_tokens"]
        assert api.chat.completions.create(model="m", **short).usage.completion_tokens == 1


def test_errors_reach_the_openai_client(server: Served) -> None:
    with client(server) as api:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="not fetched"):
                api.chat.completions.create(model="m", stream=stream, **ask("http" + "://example/a.png"))
        with pytest.raises(openai.BadRequestError) as caught:
            api.chat.completions.create(model="m", **ask(URI, question="word " * 600))
        assert caught.value.code == "context_length_exceeded"


def test_pruning_of_a_request(server: Served) -> None:
    def kept(**fields: Any) -> float:
        before = server.metric("image_tokens_kept_total")
        status, answer = server.post(ask(URI, **fields))
        assert status == 200, answer
        return server.metric("image_tokens_kept_total") - before

    assert kept() == 72
    assert kept(prune={"n_keep": 32}) == 32
    assert kept(prune={"keep_ratio": 0.5, "select": "dpp", "alpha": "dynamic"}) == 72
    assert kept(prune=None) == 144
    assert kept() == 72
    assert kept(prune={"n_keep": 999}) == 144  # a fixed K meets pictures of any size


def test_a_picture_is_encoded_once(server: Served) -> None:
    """Another K of a picture that was seen takes a small part of the time that its encode took."""
    url = picture(300, 301)
    ms = [
        server.post(ask(url, prune={"n_keep": k}, cache_prompt=False))[1]["prune"]["encode_ms"] for k in (9, 20, 30, 40)
    ]
    assert 0 < min(ms[1:]) < ms[0] / 3, ms


def picture(width: int, height: int, form: str = "png", **save: Any) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, form, **save)
    return f"data:image/{form};base64," + base64.b64encode(buffer.getvalue()).decode()


def bomb() -> str:
    """A PNG header that says 60,000 x 60,000, with a little data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (60_000).to_bytes(4, "big")
    body = chunk(b"IHDR", side + side + b"\x08\x02\x00\x00\x00") + chunk(b"IDAT", zlib.compress(b"\x00" * 100_000))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")).decode()


EPS = (
    "data:image/eps;base64,"
    + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n").decode()
)
WEB = "http" + "://"
ORIGIN = "https" + "://example"
FAR = {"type": "json_object", "schema": {"$ref": ORIGIN + "/schema"}}
#: name -> (body, status, words in the message)
HOSTILE: dict[str, tuple[Any, int, str]] = {
    "huge picture": (ask(picture(6000, 6000)), 400, "25000000 pixels"),
    "decompression bomb": (ask(bomb()), 400, "pixels"),
    "large file": (ask("data:image/png;base64," + "A" * 1_900_000), 400, "at most 1048576 bytes"),
    "wrong base64": (ask("data:image/png;base64,@@@@"), 400, "base64"),
    "not a picture": (ask("data:image/png;base64,aGVsbG8="), 400, "picture"),
    "a program for another reader": (ask(EPS), 400, "picture"),
    "private URL": (ask(WEB + "127.0.0.1:1/a.png"), 400, "not fetched"),
    "cloud metadata": (ask(WEB + "169.254.169.254/latest"), 400, "not fetched"),
    "file URL": (ask("file:///etc/passwd"), 400, "not read"),
    "path": (ask("/etc/passwd"), 400, "not read"),
    "50 images": (ask(*["data:,x"] * 50), 400, "at most 8 images"),
    "broken JSON": (b'{"messages": [', 400, "JSON"),
    "deep JSON": (b"[" * 100_000, 400, ""),
    "not JSON": (b"\xff\xfe", 400, ""),
    "a list": (b"[]", 400, ""),
    "no messages": ({}, 400, "messages"),
    "empty messages": ({"messages": []}, 400, "messages"),
    "messages of another kind": ({"messages": [5]}, 400, "messages"),
    "a part of another kind": ({"messages": [{"role": "user", "content": [5]}]}, 400, "text or image_url"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
    "surrogate in a stop": (b'{"stop": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', 400, "Unicode"),
    "marker": (ask(question="<__media__>"), 400, "marker"),
    "too long": (ask(question="word " * 900), 400, "n_ctx"),
    "two answers": (ask(n=2), 400, "n:"),
    "no tokens": (ask(max_tokens=0), 400, "max_tokens"),
    "NaN": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "temperature"),
    "unknown prune field": (ask(URI, prune={"keep": 5}), 400, "prune config"),
    "self in prune": (ask(URI, prune={"self": 5}), 400, "prune config"),
    "two lines in prune": (ask(URI, prune={"two\nlines": 5}), 400, "prune config"),
    "prune of another kind": (ask(URI, prune=5), 400, "prune"),
    "a signal that is not there": (ask(URI, prune={"semantic": "clip_text"}), 400, "semantic"),
    "grammar": (ask(grammar="root ::= ("), 400, "GBNF"),
    "deep grammar": (ask(grammar="root ::= " + "(" * 90_000 + '"a"' + ")" * 90_000), 400, "nested"),
    "grammar without an end": (ask(grammar='root ::= "\\x00"'), 400, "no token"),
    "schema": (ask(response_format={"type": "json_object", "schema": {"$ref": "#/none"}}), 400, "schema"),
    "schema from the web": (ask(response_format=FAR), 400, "schema"),
    "bias": (ask(logit_bias={"99999999": 1}), 400, "logit_bias"),
    "many stops": (ask(stop=["a"] * 100), 400, "stop"),
    "tools of another kind": (ask(tools=[{"a": 1}]), 400, "tools"),
    "functions of another kind": (ask(functions=5), 400, "functions"),
    "a format of another kind": (ask(response_format=5), 400, "response_format"),
    "options of a stream of another kind": (ask(stream_options=5), 400, "stream_options"),
    "variables of another kind": (ask(chat_template_kwargs={"a": [1]}), 400, "chat_template_kwargs"),
    "large body": (b'{"a": "' + b"x" * 3_000_000 + b'"}', 413, "at most 2097152 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_refused(server: Served, body: Any, status: int, words: str) -> None:
    found, answer = server.post(body)
    assert found == status, answer
    error = answer["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.get("/health")[1] == {"status": "ok", "model": "tiny-llava-Q4_0", "requests": 0}


def test_other_routes(server: Served) -> None:
    tokens = server.post({"input": "hello world"}, "/extras/tokenize")[1]["tokens"]
    assert server.post({"input": "hello world"}, "/extras/tokenize/count")[1] == {"count": len(tokens)}
    assert server.post({"tokens": tokens}, "/extras/detokenize")[1] == {"text": "hello world"}
    assert server.post({"tokens": [-1]}, "/extras/detokenize")[0] == 400
    assert server.post({"prompt": ["a", "b"]}, "/v1/completions")[0] == 400
    assert server.post({"prompt": "word " * 900}, "/v1/completions")[0] == 400
    assert server.post({"prompt": "a", "suffix": "b"}, "/v1/completions")[0] == 400
    assert server.get("/nowhere")[0] == 404
    assert server.get("/v1/chat/completions")[0] == 405
    status, text = server.get("/metrics")
    assert status == 200
    assert "# TYPE qap_requests_total counter" in text
    assert server.metric("answers_total") > 0


def connected(server: Served, n_bytes: int, *headers: str) -> socket.socket:
    """A connection on which the head of a request was sent."""
    host, port = server.url.removeprefix(WEB).split(":")
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: a", "Content-Type: application/json", *headers]
    raw = socket.create_connection((host, int(port)), 10)
    raw.sendall("\r\n".join([*lines, f"Content-Length: {n_bytes}", "", ""]).encode())
    return raw


def test_a_client_that_leaves_frees_the_model(server: Served) -> None:
    fields: dict[str, Any] = {
        "question": "List the objects in row order.",
        "max_tokens": 300,
        "logit_bias": {"2": -100},
    }
    body = json.dumps(ask(URI, stream=True, **fields)).encode()
    for _ in range(2):
        with connected(server, len(body)) as raw:
            raw.sendall(body)
            assert b"200 OK" in raw.recv(200)
    assert server.post(ask(URI))[1]["choices"][0]["message"]["content"] == "house"


def test_keys_limits_and_origins() -> None:
    options = (
        "--api-key",
        "secret",
        "--max-tokens",
        "2",
        "--max-requests",
        "1",
        "--cors",
        "https" + "://example",
        "--dense",
    )
    with serving("--ctx", "512", "--model-alias", "mine", *options) as server:
        key = {"Authorization": "Bearer secret"}
        for headers in (None, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            status, answer = server.post(ask(URI), headers=headers)
            assert (status, answer["error"]["type"]) == (401, "invalid_request_error")
            assert server.get("/metrics", headers)[0] == 401
        assert server.get("/health")[1]["model"] == "mine"
        for origin, allowed in ((ORIGIN, ORIGIN), (ORIGIN + ".evil", None)):
            request = urllib.request.Request(server.url + "/health", headers={"Origin": origin})
            with urllib.request.urlopen(request) as response:
                assert response.headers.get("access-control-allow-origin") == allowed
        question = "List the objects in row order."
        status, answer = server.post(ask(URI, question=question, max_tokens=50), headers=key)
        assert answer["usage"]["completion_tokens"] == 2
        assert answer["usage"]["prompt_tokens"] > 144
        endless = json.dumps(ask(question="a" * 9, stream=True)).encode()
        with connected(server, len(endless), "Authorization: Bearer secret") as raw:
            raw.sendall(endless[:5])  # a request that has come in part only waits, and takes nobody's place
            assert server.post(ask(URI), headers=key)[0] == 200


def test_the_packaged_picture_as_other_formats(server: Served) -> None:
    with Image.open(SAMPLE) as image:
        for form in ("bmp", "webp", "gif"):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, form, **({"lossless": True} if form == "webp" else {}))
            uri = f"data:image/{form};base64," + base64.b64encode(buffer.getvalue()).decode()
            assert server.post(ask(uri, prune=None))[1]["choices"][0]["message"]["content"] == "house", form
