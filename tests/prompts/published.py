"""Templates of the structure of published ones, or out of the pinned llama.cpp; and what transformers makes of them.

The short ones were written for these tests: the kind of content that they read, where an image goes, which roles they
know and how they end a turn are those of the models named, their wording is not.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Published:
    """A template.

    Attributes:
        source: Jinja; a name that ends with .jinja stands for a file of the pinned llama.cpp.
        image: what it writes for an image, white space beside it excepted.
        tools: it writes calls of tools.
    """

    source: str
    image: str | None = None
    tools: bool = False
    bos: str = "<s>"
    eos: str = "</s>"


def _turns(head: str, text: str, image: str, tail: str, end: str, default: str = "") -> str:
    """A template over parts or text: `head` and `tail` around each message, `end` for the answer to come."""
    return (
        f"{default}{{% for m in messages %}}{head}"
        "{% if m.content is string %}{{ m.content }}{% elif m.content is not none %}{% for p in m.content %}"
        f"{{% if p.type == 'image' %}}{image}{{% elif p.type == 'text' %}}{text}{{% endif %}}"
        f"{{% endfor %}}{{% endif %}}{tail}{{% endfor %}}{{% if add_generation_prompt %}}{end}{{% endif %}}"
    )


_IM = ("{{ '<|im_start|>' + m.role + '\n' }}", "{{ p.text }}")
_IM_END = ("{{ '<|im_end|>\n' }}", "{{ '<|im_start|>assistant\n' }}")
_CALLS = (
    '{% if m.tool_calls %}{% for c in m.tool_calls %}{{ \'<tool_call>\n{"name": "\' + c.function.name + '
    "'\", \"arguments\": ' }}{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{% endif %}"
)
_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}{% for t in tools %}{{ '\n' }}{{ t | tojson }}"
    '{% endfor %}{{ \'\n</tools>\nReturn <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n\' }}'
    "{% endif %}"
)
_PARTS_ONLY = (
    "{% for m in messages %}{{ m.role | upper }}: {% for p in m.content | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_SMOL = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}:{% else %}{{ ': ' }}{% endif %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}<image>{% endif %}"
    "{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% if messages[0].content is string %}"
    "{% set first = messages[0].content + '\n\n' %}{% else %}{% set first = messages[0].content[0].text + '\n\n' %}"
    "{% endif %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{% if m.content is string %}{{ m.content | trim }}{% elif m.content is iterable %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<start_of_image>{% elif p.type == 'text' %}{{ p.text | trim }}{% endif %}"
    "{% endfor %}{% else %}{{ raise_exception('content') }}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
    "USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_PAD = "<|vision_start|><|image_pad|><|vision_end|>"
_DEFAULT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
_LLAMA4 = "{{ '<|header_start|>' + m.role + '<|header_end|>\n\n' }}"
_LLAMA4_END = _LLAMA4.replace("m.role", "'assistant'")
_WITH_CALLS = (_CALLS + _IM_END[0], _IM_END[1])

TEMPLATES: dict[str, Published] = {
    "llava-hf": Published(_PARTS_ONLY, "<image>"),
    "Vicuna": Published(_VICUNA),
    "ChatML": Published(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "SmolVLM": Published(_SMOL, "<image>"),
    "Qwen2-VL": Published(_turns(*_IM, _PAD, *_IM_END, default=_DEFAULT), _PAD),
    "Qwen2.5-VL": Published(_turns(*_IM, _PAD, *_WITH_CALLS, default=_TOOLS + _DEFAULT), _PAD, tools=True),
    "Qwen3-VL": Published("Qwen3.5-4B.jinja", _PAD, tools=True),
    "Gemma 3": Published(_GEMMA, "<start_of_image>", bos="<bos>"),
    "InternVL3": Published(_turns(*_IM, "{{ '<IMG_CONTEXT>\n' }}", *_IM_END), "<IMG_CONTEXT>"),
    "Pixtral": Published("Mistral-Small-3.2-24B-Instruct-2506.jinja", "[IMG]", tools=True),
    "Llama 4": Published(
        _turns(_LLAMA4, "{{ p.text }}", "<|image|>", "<|eot|>", _LLAMA4_END, "{{ bos_token }}"), "<|image|>"
    ),
    "LFM2-VL": Published(_turns(*_IM, "<image>", *_IM_END, "{{ bos_token }}"), "<image>", bos="<|startoftext|>"),
    "Phi": Published("microsoft-Phi-3.5-mini-instruct.jinja"),
}


@lru_cache(maxsize=1)
def templates_folder() -> Path:
    """``models/templates`` of the pinned sources."""
    command = [sys.executable, str(ROOT / "tools" / "build" / "fetch_upstream.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no upstream sources: {done.stderr.strip()[-200:]}")
    return Path(done.stdout.strip()) / "models" / "templates"


def source_of(template: Published) -> str:
    """The Jinja of a template."""
    if template.source.endswith(".jinja"):
        return (templates_folder() / template.source).read_text(encoding="utf-8")
    return template.source


def by_transformers(template: Published, messages: list[dict[str, Any]], **variables: Any) -> str:
    """What ``apply_chat_template`` gives; messages in its form, images as ``{"type": "image"}``."""
    module = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    rendered, _ = module.render_jinja_template(
        conversations=[messages],
        chat_template=source_of(template),
        add_generation_prompt=True,
        bos_token=template.bos,
        eos_token=template.eos,
        **variables,
    )
    return str(rendered[0])
