"""tools/build/requirements.py: every extra expands, and a reference to our own extra never reaches pip."""

from __future__ import annotations

import subprocess
import sys

import pytest

import requirements

EXTRAS = sorted(requirements.load(requirements.ROOT / "pyproject.toml")["project"]["optional-dependencies"])


@pytest.mark.parametrize("word", ["build", "run", *EXTRAS])
def test_word_expands(word: str) -> None:
    done = subprocess.run([sys.executable, requirements.__file__, word], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert rows
    assert not [row for row in rows if row.lower().replace("-", "_").startswith("qap_gguf")]


@pytest.mark.parametrize("row", ["qap-gguf[clip-text]", "qap_gguf[clip-text]", "QAP_gguf[ clip-text , plot ]"])
def test_own_extra_with_a_dash(row: str) -> None:
    project = {
        "project": {
            "name": "qap-gguf",
            "optional-dependencies": {"clip-text": ["tokenizers>=0.20"], "plot": ["matplotlib>=3.8"], "test": [row]},
        }
    }
    assert requirements.expand(project, "test")[0] == "tokenizers>=0.20"
