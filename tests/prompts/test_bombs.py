"""Templates of strangers that would take all memory, all time or the stack are refused, soon and in one line."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import jinja2
import llama_cpp
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.gguf_copy import rewrite
from qap_gguf.errors import ModelFileError
from qap_gguf.generation.chat_formats import ChatFormat
from qap_gguf.generation.chat_template import ChatTemplate
from qap_gguf.generation.messages import read_messages
from qap_gguf.language.opener import open_llama

LOOP = "{% for a in range(9999) %}"
BOMBS = {
    "a power": "{{ 'a' * 10**10 }}",
    "a long text": "{{ 'a' * 10000000000 }}",
    "a long loop": "{% for a in range(1000000000) %}x{% endfor %}",
    "loops in loops": LOOP * 3 + "x" + "{% endfor %}" * 3,
    "doubling": (
        "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "replacing": "{{ ('a' * 50000) | replace('a', 'a' * 50000) }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a call block that calls itself": "{% macro f() %}{% call f() %}{% endcall %}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "deep loops": "{% for a in [1] %}" * 3000 + "{% endfor %}" * 3000,
    "deep conditions": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
    "not not not": "{{ " + "not " * 100_000 + "1 }}",
    "one and one and one": "{{ 1" + " + 1" * 100_000 + " }}",
    "a long one": "{{ messages }}" + "x" * 600_000,
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused(source: str) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ModelFileError, match="template") as caught:
        ChatTemplate(0, ChatFormat(source)).render(read_messages([{"role": "user", "content": "hi"}]))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 60  # without a limit: hours
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * 2**20  # kilobytes


def test_a_bomb_for_one_text_only() -> None:
    """The budget holds for every rendering, not only for the first look at the template."""
    source = "{% for m in messages %}{{ m.content }}{% if m.content == 'boom' %}" + BOMBS["a long text"]
    template = ChatTemplate(0, ChatFormat(source + "{% endif %}{% endfor %}"))
    assert template.render(read_messages([{"role": "user", "content": "hi"}])).text == "hi"
    with pytest.raises(ModelFileError, match="more steps, memory"):
        template.render(read_messages([{"role": "user", "content": "boom"}]))
    assert template.render(read_messages([{"role": "user", "content": "hi"}])).text == "hi"


def test_long_conversations_are_no_bombs() -> None:
    template = ChatTemplate(0, ChatFormat("{% for m in messages %}{{ m.role + ': ' + m.content | trim }}{% endfor %}"))
    messages = [{"role": "user", "content": "word " * 40}] * 4000
    assert template.render(read_messages(messages)).text.count("word") == 160_000


def test_a_bomb_in_a_file_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python compiles the template of a file that it opens, and Jinja2 computes constants as it compiles."""

    def compiled(*_words: object, **_settings: object) -> None:
        raise AssertionError("Jinja2 was asked")

    monkeypatch.setattr(jinja2.Environment, "from_string", compiled)
    files = qap.packaged_model()
    path = rewrite(files.model, tmp_path / "bomb.gguf", {"tokenizer.chat_template": BOMBS["a long text"]})
    with (
        qap.VisionModel(files.mmproj, path, n_threads=1, n_ctx=64) as vlm,
        pytest.raises(ModelFileError, match="more steps, memory"),
    ):
        vlm.generate(["hi"], max_tokens=1)


def test_the_own_chat_of_a_llama_is_the_same(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.role + ' says: ' + m.content }}{% endfor %}"
    path = rewrite(qap.packaged_model().model, tmp_path / "own.gguf", {"tokenizer.chat_template": source})
    settings: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    found = []
    for llama in (open_llama(path, **settings), llama_cpp.Llama(str(path), **settings)):
        answer: Any = llama.create_chat_completion([{"role": "user", "content": "boat"}], max_tokens=4, temperature=0)
        found.append((llama.chat_format, answer["usage"], answer["choices"]))
        llama.close()
    assert found[0] == found[1]
    assert llama_cpp.llama_chat_format.Jinja2ChatFormatter.__name__ == "Jinja2ChatFormatter"
