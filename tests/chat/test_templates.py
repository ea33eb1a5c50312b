"""Where an image goes in a prompt, for templates of every kind; and chat formats by name."""

from __future__ import annotations

from typing import Any

import llama_cpp
import pytest

import qap_gguf as qap
from chat.conftest import image_url, text, user
from qap_gguf import _core
from qap_gguf.errors import ModelFileError
from qap_gguf.generation.chat_formats import IMAGE_FORMATS, TEXT_FORMATS, ChatFormat, named_format
from qap_gguf.generation.chat_template import ChatTemplate
from qap_gguf.generation.messages import read_messages

MARK = _core.media_marker()
LOOP = "{% for m in messages %}{{ m.role }}: BODY{% endfor %}>"
STRING = LOOP.replace("BODY", "{{ m.content }}")
JOINED = LOOP.replace("BODY", "{{ m.role + m.content }}")
PARTS = LOOP.replace(
    "BODY",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% else %}IMAGE{% endif %}{% endfor %}{% endif %}",
)
# as LLaVA's template in transformers: all images of a message, then its texts
IMAGES_FIRST = LOOP.replace(
    "BODY",
    "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text + ' ' }}{% endfor %}",
)
CASES = {
    "string": (STRING, f"user: before{MARK}\nafter>"),
    "joined": (JOINED, f"user: userbefore{MARK}\nafter>"),
    "parts": (PARTS.replace("IMAGE", "<image>"), f"user: before{MARK}after>"),
    "parts, line break": (PARTS.replace("IMAGE", "{{ '<image>\\n' }}"), f"user: before{MARK}\nafter>"),
    "parts, own tokens": (PARTS.replace("IMAGE", " <|start|><|pad|><|end|>"), f"user: before {MARK}after>"),
    "images first": (IMAGES_FIRST, f"user: {MARK}\nbefore\nafter >"),
}


def opened(source: str, **texts: str) -> ChatTemplate:
    return ChatTemplate(0, ChatFormat(source), **texts)


def render(template: ChatTemplate, messages: Any, **settings: Any) -> str:
    return template.render(read_messages(messages), **settings).text


@pytest.mark.parametrize(("source", "expected"), CASES.values(), ids=CASES.keys())
def test_where_an_image_goes(source: str, expected: str) -> None:
    template = opened(source)
    assert render(template, user(text("before"), image_url("data:,x"), text("after"))) == expected
    assert MARK not in render(template, user(text("an <image> in words")))


def test_the_packaged_prompt_is_the_same_through_both_doors(packaged: qap.PackagedModel) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *user(b"image", "What?")]
    expected = (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{MARK}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    with qap.VisionModel(n_ctx=64) as vlm, qap.ChatHandler(packaged.mmproj) as handler:
        assert render(vlm._template, messages) == expected
        assert render(handler._prepare(vlm.language_model)[1], messages) == expected


@pytest.mark.parametrize("name", [*IMAGE_FORMATS, "alpaca", *TEXT_FORMATS, "llama4", "smolvlm"])
def test_named_formats(name: str) -> None:
    template = ChatTemplate(0, named_format(name), bos="<s>", eos="</s>")
    found = render(template, user(image_url("data:,x"), image_url("data:,y"), text("What is it?")))
    assert found.count(MARK) == 2
    assert found.count("What is it?") == 1
    assert found.index(MARK) < found.index("What is it?")
    assert render(template, user(text("What is it?"))).count("What is it?") == 1


@pytest.mark.parametrize("name", [*IMAGE_FORMATS, "alpaca", *TEXT_FORMATS])
def test_no_format_drops_a_turn_without_a_word(name: str) -> None:
    template = ChatTemplate(0, named_format(name), bos="<s>", eos="</s>")
    calls = [{"id": "a1b2c3d4e", "function": {"name": "look", "arguments": "{}"}}]
    called = [*user("Look."), {"role": "assistant", "content": None, "tool_calls": calls}]
    for messages, words in (
        ([{"role": "developer", "content": "Be brief."}, *user("Hello")], ["Be brief.", "Hello"]),
        ([*called, {"role": "tool", "content": "22 degrees"}], ["look", "22 degrees"]),
    ):
        try:
            found = render(template, messages)
        except ModelFileError as err:
            assert "drops text of role" in str(err)  # noqa: PT017
            continue
        assert all(word in found for word in words)


def test_tools_and_other_variables_reach_the_template() -> None:
    source = (
        "{% for t in tools %}{{ t.function.name }} {% endfor %}{{ extra }}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "g", "arguments": '{"a": 1}'}}
    messages = [*user("hi "), {"role": "assistant", "content": None, "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    found = render(opened(source), messages, tools=[tool], tool_choice="none", variables={"extra": 5})
    assert found.startswith("f 5hi g")


def test_who_writes_bos(llama: Any) -> None:
    """The tokenizer, where the model says so; then a template's own is taken out."""
    address, bos = int(llama._model.model), llama.detokenize([llama.token_bos()], special=True).decode()
    adds = llama_cpp.llama_vocab_get_add_bos(llama._model.vocab)
    for source in (STRING, "{{ bos_token }}" + STRING):
        found = render(ChatTemplate(address, ChatFormat(source)), user("a"))
        assert found == ("" if adds or source is STRING else bos) + "user: a>"
    assert render(opened("{{ bos_token }}" + STRING, bos="<s>"), user("a")) == "<s>user: a>"


def test_templates_that_refuse() -> None:
    with pytest.raises(ModelFileError, match="valid Jinja"):
        opened("{% for %}")
    with pytest.raises(ModelFileError, match="surrogate"):
        opened("\ud800{{ messages }}")
    with pytest.raises(ModelFileError, match="only users") as caught:
        render(opened("{{ raise_exception('only users') }}"), user("a"))
    assert "\n" not in str(caught.value)
    drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelFileError, match="0 of 1"):
        render(opened(drops), [{"role": "assistant", "content": [b"image"]}])
    with pytest.raises(ModelFileError, match="role 'assistant'"):
        render(opened(drops), [{"role": "assistant", "content": "a word"}])
    with pytest.raises(ModelFileError, match="refuses"):
        render(opened("{{ ''.__class__.__mro__[1].__subclasses__() }}"), user("a"))
