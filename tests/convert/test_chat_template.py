"""A converted checkpoint's chat template is rendered as transformers renders it, whatever form of content it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.convert import convert
from qap_gguf.generation.messages import read_messages

# In the manner of llava-hf's: images first, then texts, out of a list of parts; a text is passed over.
PARTS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}[assistant]"
STRICT = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"  # raises for a text


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (PARTS, "USER: {marker}\nWhat is this? ASSISTANT:"),
        (TEXT, "[user] {marker}\nWhat is this?\n[assistant]"),
        (STRICT, "{marker}\nWhat is this?"),
    ],
    ids=["parts", "text", "parts only"],
)
def test_the_question_and_the_image_are_in_the_prompt(
    plain_llava: Path, tmp_path: Path, template: str, want: str
) -> None:
    folder = Path(shutil.copytree(plain_llava, tmp_path / "copy"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    files = convert(folder, tmp_path / "out", quantize="F16", mmproj_type="f16")
    with qap.VisionModel(files.mmproj, files.model, n_ctx=128, n_threads=1) as vlm:
        turns = read_messages([{"role": "user", "content": [np.zeros((28, 28, 3), np.uint8), "What is this?"]}])
        assert vlm._template.render(turns).text == want.format(marker=_core.media_marker())
