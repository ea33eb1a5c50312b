"""Prompts of published templates: equal to transformers' ``apply_chat_template``, or the difference has a name.

The marker stands where the template writes its image token. llama.cpp renders; where it departs on purpose, the table
below says how.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from prompts.cases import CASES, TOOL, ours_of, theirs_of
from prompts.published import TEMPLATES, Published, by_transformers, source_of
from qap_gguf import _core
from qap_gguf.errors import ModelFileError
from qap_gguf.generation.chat_formats import VICUNA, ChatFormat
from qap_gguf.generation.chat_template import ChatTemplate
from qap_gguf.generation.messages import read_messages

MARK = _core.media_marker()
#: (template, conversation): what llama.cpp does otherwise, or, for calls, what we add.
DIFFERENCES: dict[tuple[str, str], str] = {
    **{(name, "developer"): "developer turns become system turns" for name in TEMPLATES},
    **{
        (name, "tool loop"): "calls that the template leaves out stand there as JSON text"
        for name in ("llava-hf", "ChatML", "SmolVLM", "Qwen2-VL", "InternVL3", "Llama 4", "LFM2-VL")
    },
    **{
        ("SmolVLM", case): "a space between the role and an image, for the image is a part of the text"
        for case in ("single turn", "follow-up without a picture", "system", "two pictures")
    },
}
#: (template, conversation): the reason of the error; transformers raises too, or drops text in silence.
REFUSED: dict[tuple[str, str], str] = {
    ("Vicuna", "tool loop"): "role 'tool'",
    ("Phi", "tool loop"): "role 'tool'",
    ("Gemma 3", "tool loop"): "roles must alternate",
}


def opened(template: Published) -> ChatTemplate:
    return ChatTemplate(0, ChatFormat(source_of(template)), bos=template.bos, eos=template.eos)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_has_it(name: str, case: str) -> None:
    template, messages = TEMPLATES[name], CASES[case]
    tools = [TOOL] if case == "tool loop" else []
    turns = read_messages(ours_of(messages))
    if (name, case) in REFUSED:
        with pytest.raises(ModelFileError, match=REFUSED[name, case]):
            opened(template).render(turns, tools=tools)
        return
    found = opened(template).render(turns, tools=tools).text
    theirs = theirs_of(messages, MARK if template.image is None else None)
    expected = None
    with contextlib.suppress(Exception):  # templates raise what they like
        expected = by_transformers(template, theirs, **({"tools": tools} if tools else {}))
    if expected is not None and template.image is not None:
        expected = expected.replace(template.image, MARK)
    if (name, case) in DIFFERENCES:
        assert found != expected, "the difference is gone: take it out of the table"
    else:
        assert found == expected


def test_without_a_template() -> None:
    """A LLaVA gets Vicuna v1 with its system text."""
    template = ChatTemplate(0, VICUNA, bos="<s>", eos="</s>")
    found = template.render(read_messages(ours_of(CASES["follow-up without a picture"]))).text
    assert found == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the human's questions. USER: {MARK}\nWhat is it? ASSISTANT: A boat.</s>"
        "USER: Which colour? ASSISTANT:"
    )
    with pytest.raises(ModelFileError, match="role 'tool'"):
        template.render(read_messages(ours_of(CASES["tool loop"])))


@pytest.mark.parametrize("name", ["llava-hf", "SmolVLM", "Qwen2-VL"])
def test_both_doors_render_the_same(name: str, packaged: qap.PackagedModel) -> None:
    """By construction: a model and a handler over it, with the same format, give one prompt for plain lists too."""
    template = TEMPLATES[name]
    with (
        qap.VisionModel(n_ctx=64) as vlm,
        qap.ChatHandler(packaged.mmproj, chat_template=source_of(template)) as handler,
    ):
        vlm.__dict__["_template"] = ChatTemplate(vlm._language.model_address, ChatFormat(source_of(template)))
        _, other = handler._prepare(vlm.language_model)
        for messages in CASES.values():
            turns = read_messages(ours_of(messages))
            assert vlm._template.render(turns).text == other.render(turns).text
        plain: list[Any] = [{"role": "user", "content": [b"picture", "What is it?"]}]
        turns = read_messages(ours_of(CASES["single turn"]))
        assert vlm._template.render(read_messages(plain)).text == other.render(turns).text


def test_a_str_that_names_a_picture_is_an_error(packaged: qap.PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(packaged.sample.parent)
    with qap.VisionModel(n_ctx=512, n_threads=1) as vlm:
        for path in (str(packaged.sample), packaged.sample.name):
            with pytest.raises(qap.ConfigError, match=r"pathlib\.Path"):
                vlm.generate([path, "What is it?"])
        assert vlm.generate(["no-such.png", "What is it?"], max_tokens=1) is not None  # text that looks like a path
        part = {"type": "image_url", "image_url": {"url": str(packaged.sample)}}
        messages = [{"role": "user", "content": [part, "What is in row 1, column 2?"]}]
        assert vlm.chat(messages) == "house"
    read_messages([{"role": "user", "content": [packaged.sample.name]}], look_for_files=False)  # a server's client
