"""From a client's request to llama-server's: pictures become PNG, prompts stay those of ChatHandler."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qap_gguf as qap
from prompts.cases import CASES, TOOL, ours_of
from prompts.published import TEMPLATES, source_of
from qap_gguf import _core
from qap_gguf.errors import ConfigError, ModelFileError, UnsupportedError
from qap_gguf.generation.chat_formats import ChatFormat, named_format
from qap_gguf.generation.messages import read_messages
from qap_gguf.serve.answers import events_of
from qap_gguf.serve.child import Child
from qap_gguf.serve.forced import ForcedCall
from qap_gguf.serve.options import model_options, server_options, template_options
from qap_gguf.serve.requests import Preparer
from qap_gguf.serve.settings import ServeSettings
from qap_gguf.vision.images import load_image
from serve.conftest import SAMPLE, URI, ask, find_program_or_skip

MARK = _core.media_marker()
FORMATS = [None, "chatml", "vicuna", "llava-1-5", "qwen2.5-vl", "alpaca"]
TALKS: dict[str, list[dict[str, Any]]] = {
    "a text": ask(question="What is it?")["messages"],
    "a picture": ask(URI, question="What is it?")["messages"],
    "two pictures": ask(URI, URI, question="Which?")["messages"],
    "a picture after": [
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": URI}]}
    ],
    "between": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "text", "text": "One"}, {"type": "image_url", "image_url": {"url": URI}},
            {"type": "text", "text": "two"}, {"type": "text", "text": "three"},
        ]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And now?"},
    ],
}  # fmt: skip


@contextlib.contextmanager
def preparing(form: ChatFormat | None = None, **settings: Any) -> Iterator[Preparer]:
    files = qap.packaged_model()
    limits = ServeSettings(**{"n_ctx": 512, **settings})
    with contextlib.closing(Preparer(files.model, files.mmproj, qap.PruneConfig(n_keep=72), limits, form)) as found:
        yield found


@pytest.fixture(scope="module")
def preparer() -> Iterator[Preparer]:
    with preparing() as found:
        yield found


def jpeg_on_its_side() -> bytes:
    """A picture whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_pictures_arrive_as_we_decode_them(preparer: Preparer) -> None:
    data = jpeg_on_its_side()
    prepared = preparer.chat(ask("data:image/jpeg;base64," + base64.b64encode(data).decode(), URI))
    assert len(prepared.images) == 2
    preparer.load(prepared)
    urls = [part["image_url"]["url"] for part in prepared.body["messages"][0]["content"] if "image_url" in part]
    for url, source in zip(urls, (data, SAMPLE.read_bytes()), strict=True):
        head, _, body = url.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(body))) as image:
            assert np.array_equal(np.asarray(image), load_image(source))
    assert prepared.n_pixels == sum(load_image(source)[..., 0].size for source in (data, SAMPLE.read_bytes()))


def test_thousands_of_messages_are_refused_before_they_are_read(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qap_gguf.serve.requests.read_messages", None)
    with pytest.raises(ConfigError, match="16001 messages with text; send fewer"):
        preparer.chat({"messages": [{"role": "user", "content": "a"}] * 16_001})


def test_only_known_fields_go_on(preparer: Preparer) -> None:
    odd: dict[str, Any] = {
        "n_predict": 5,
        "id_slot": 1,
        "samplers": [],
        "lora": [],
        "json_schema": {},
        "n_probs": 9,
        "ignore_eos": True,
    }
    body = preparer.chat(ask(**odd, top_k=3, mirostat_mode=2, max_completion_tokens=7)).body
    assert set(body) == {"messages", "temperature", "max_tokens", "top_k", "mirostat"}
    text = preparer.completion({"prompt": "a", "n_probs": 9, "prompt_string": "b"}).body
    assert text == {"prompt": "a", "max_tokens": 16}


def test_weights_that_the_file_lacks_are_refused(preparer: Preparer) -> None:
    with pytest.raises(UnsupportedError, match="expected channel weights"):
        preparer.chat(ask(prune={"error": "model"}))


def test_all_of_a_pruning_is_said(preparer: Preparer) -> None:
    """Nothing is left to what llama-server has by default."""
    asked = preparer.chat(ask(prune={"alpha": "dynamic"})).body["prune"]
    expected = qap.PruneConfig(n_keep=72, alpha="dynamic").to_dict() | {"skip_flat_tiles": "off", "duplicates": "off"}
    assert asked == {k: v for k, v in expected.items() if v is not None}
    assert preparer.chat(ask(prune={"duplicates": 3})).body["prune"]["duplicates"] == 3
    for off in ("off", None):
        assert preparer.chat(ask(prune={"duplicates": off, "skip_flat_tiles": 0})).body["prune"]["duplicates"] == "off"
    assert preparer.chat(ask(prune=None)).body["prune"] is False
    assert "prune" not in preparer.chat(ask()).body


@contextlib.contextmanager
def llama_server(form: ChatFormat | None) -> Iterator[Child]:
    """llama-server with a template of ours, without the guard."""
    find_program_or_skip()
    files = qap.packaged_model()
    words = model_options(
        files.model,
        files.mmproj,
        n_ctx=512,
        n_parallel=1,
        threads=1,
        device=None,
        model_device=None,
        kv=None,
        seed=None,
    )
    with template_options(form) as template:
        child = Child([*words, *server_options("a", 1), "--no-warmup", *template], {})
        with contextlib.closing(child):
            child.start()
            yield child


def prompt_of(child: Child, body: dict[str, Any]) -> str:
    """What llama-server makes of messages."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", child.port, timeout=60)) as connection:
        headers = {"Authorization": f"Bearer {child.key}", "Content-Type": "application/json"}
        connection.request("POST", "/apply-template", json.dumps(body), headers)
        reply = connection.getresponse()
        answer = json.loads(reply.read())
    assert reply.status == 200, answer
    return re.sub(r"<__media_\w+?__>", MARK, answer["prompt"])


def compare(form: ChatFormat | None, talks: dict[str, Any], tools: dict[str, Any]) -> None:
    """llama-server's prompts of what the guard sends are those of ChatHandler."""
    with preparing(form, n_ctx=4096) as found, llama_server(form) as child:
        for talk, messages in talks.items():
            asked = {"messages": messages} | ({"tools": [tools]} if talk == "tool loop" else {})
            try:
                prepared = found.chat(asked)
            except ModelFileError:
                continue  # the template refuses it, and so does the guard
            found.load(prepared)
            told: dict[str, Any] = {
                name: prepared.body[name] for name in ("messages", "tools", "tool_choice") if name in prepared.body
            }
            expected = found.template.render(read_messages(messages), tools=asked.get("tools", ())).text
            assert prompt_of(child, told) == expected, talk


@pytest.mark.parametrize("name", FORMATS)
def test_llama_server_renders_the_same_prompt(name: str | None) -> None:
    compare(None if name is None else named_format(name), TALKS, TOOL)


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates(name: str) -> None:
    def with_sample(content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        image = {"type": "image_url", "image_url": {"url": URI}}
        return [part if part["type"] == "text" else image for part in parts] if parts else content

    talks = {
        case: [m | ({"content": with_sample(m["content"])} if "content" in m else {}) for m in ours_of(messages)]
        for case, messages in CASES.items()
    }
    compare(ChatFormat(source_of(TEMPLATES[name])), talks, TOOL)


def test_events() -> None:
    assert events_of(b"", b"") == ([], b"")
    events, left = [], b""
    for block in (b'data: {"a": 1}\n', b"\ndata: 2\n\nda", b"ta: 3\n\n"):
        found, left = events_of(block, left)
        events += found
    assert events == [b'data: {"a": 1}\n\n', b"data: 2\n\n", b"data: 3\n\n"]
    assert left == b""


def test_chunks_become_a_call() -> None:
    change, called = ForcedCall("look"), ""
    for delta in ({"role": "assistant", "content": None}, {"content": '{"a"'}, {"content": ": 1}"}, {}):
        chunk = change({"choices": [{"delta": delta, "finish_reason": None if delta else "stop"}]})
        (choice,) = chunk["choices"]
        for call in choice["delta"].get("tool_calls", ()):
            assert call["index"] == 0
            assert ("id" in call) == (called == "")
            called += call["function"].get("name", "") + call["function"]["arguments"]
    assert called == 'look{"a": 1}'
    assert choice["finish_reason"] == "tool_calls"
