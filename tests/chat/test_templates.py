"""Where an image goes in a prompt, for templates of every kind; and llama-cpp-python's templates by name."""

from __future__ import annotations

from typing import Any

import pytest

import qap_gguf as qap
from chat.conftest import image_url, text, user
from qap_gguf import _core
from qap_gguf.errors import ModelFileError
from qap_gguf.generation.messages import read_messages
from qap_gguf.generation.templates import IMAGE_FORMATS, TEXT_FORMATS, ChatTemplate, named_template

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
    "string": (STRING, f"user: before\n{MARK}\nafter>"),
    "joined": (JOINED, f"user: userbefore\n{MARK}\nafter>"),
    "parts": (PARTS.replace("IMAGE", "<image>"), f"user: before{MARK}after>"),
    "parts, line break": (PARTS.replace("IMAGE", "{{ '<image>\\n' }}"), f"user: before{MARK}\nafter>"),
    "parts, own tokens": (PARTS.replace("IMAGE", " <|start|><|pad|><|end|>"), f"user: before {MARK}after>"),
    "images first": (IMAGES_FIRST, f"user: {MARK}\nbefore\nafter >"),
}


def render(template: ChatTemplate, messages: Any, **variables: Any) -> str:
    return template.render(read_messages(messages), **variables).text


@pytest.mark.parametrize(("source", "expected"), CASES.values(), ids=CASES.keys())
def test_where_an_image_goes(source: str, expected: str) -> None:
    template = ChatTemplate(source)
    assert render(template, user(text("before"), image_url("data:,x"), text("after"))) == expected
    assert MARK not in render(template, user(text("an <image> in words")))


def test_the_packaged_template_is_what_vision_model_writes() -> None:
    with qap.VisionModel(n_ctx=64) as vlm:
        source = vlm.language_model.metadata["tokenizer.chat_template"]
    messages = [{"role": "system", "content": "Be brief."}, *user(b"image", "What?")]
    expected = (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{MARK}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(ChatTemplate(source), messages) == expected


@pytest.mark.parametrize("name", [*IMAGE_FORMATS, *TEXT_FORMATS])
def test_named_formats(name: str) -> None:
    template = named_template(name, bos="<s>", eos="</s>")
    found = template.render(read_messages(user(image_url("data:,x"), image_url("data:,y"), text("What is it?"))))
    assert found.text.count(MARK) == 2
    assert found.text.count("What is it?") == 1
    assert found.text.index(MARK) < found.text.index("What is it?")
    assert render(template, user(text("What is it?"))).count("What is it?") == 1


def test_tools_and_other_variables_reach_the_template() -> None:
    source = "{% for t in tools %}{{ t.function.name }} {% endfor %}{{ extra }}{{ messages[0].tool_calls }}"
    messages = [{"role": "assistant", "content": None, "tool_calls": ["x"]}]
    found = render(ChatTemplate(source), messages, tools=[{"function": {"name": "f"}}], extra=5)
    assert found == "f 5['x']"


def test_who_writes_bos() -> None:
    written = ChatTemplate("<s>" + STRING, bos="<s>").render(read_messages(user("a")))
    left = ChatTemplate(STRING, bos="<s>").render(read_messages(user("a")))
    assert (written.writes_bos, left.writes_bos) == (True, False)


def test_templates_that_refuse() -> None:
    with pytest.raises(ModelFileError, match="valid Jinja"):
        ChatTemplate("{% for %}")
    with pytest.raises(ModelFileError, match="only users"):
        render(ChatTemplate("{{ raise_exception('only users') }}"), user("a"))
    drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelFileError, match="0 of 1"):
        render(ChatTemplate(drops), [{"role": "assistant", "content": [b"image"]}])
    with pytest.raises(ModelFileError, match="refuses"):
        render(ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}"), user("a"))
