"""Every ggml operation of the text tower's graphs is one that CPU, CUDA, Metal and Vulkan have, for the types used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qap_gguf as qap
from clip_text.clip_checkpoint import hidden_states
from ops.graphs import Node, watched
from ops.tables import BACKENDS, Tables, cases_of, read_tables, why_unsupported
from qap_gguf.pruning.clip_text import ClipTextTower

if TYPE_CHECKING:
    from clip_text.conftest import Clip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> Tables:
    """ggml's own tables, from the pinned sources."""
    command = [sys.executable, str(ROOT / "tools" / "build" / "fetch_upstream.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    folder = Path((done.stdout.splitlines() or ["none"])[-1]) / "docs" / "ops"
    if done.returncode != 0 or not folder.is_dir():
        pytest.skip(f"no operation tables: {done.stderr.strip()[-200:]}")
    return read_tables(folder)


def nodes_of(mmproj: Path) -> list[Node]:
    tower = ClipTextTower.open(mmproj)
    assert tower is not None
    with tower, watched() as nodes:
        tower.relevance(hidden_states(5), "a photo of a cat")
    return nodes


def test_every_operation_is_supported(clip: Clip, plain_llava: Path, tmp_path: Path, tables: Tables) -> None:
    half = qap.convert(plain_llava, tmp_path, quantize="F16", mmproj_type="f16", clip_text=clip.folder)
    cases = cases_of([*nodes_of(clip.mmproj), *nodes_of(half.mmproj)])
    names = {str(case).split(" ", maxsplit=1)[0] for case in cases}
    activation = {"quick_gelu": "GELU_QUICK", "gelu": "GELU_ERF"}[clip.case.activation]
    assert {"GET_ROWS", "NORM", "MUL_MAT", "SOFT_MAX", "CONT", activation} <= names
    for backend in BACKENDS:
        found = {str(case): why_unsupported(case, tables[backend]) for case in cases}
        assert not {case: why for case, why in found.items() if why is not None}, backend
