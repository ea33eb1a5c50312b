"""Converted files run in stock llama-cpp-python: its own libmtmd and chat handler, qap_gguf not in the process.

Its encoder has its defects there; with the same defects switched on ours gives the same answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import pytest

import qap_gguf as qap
from dropin.children import run_probe
from qap_gguf import _core
from qap_gguf.convert import convert
from qap_gguf.runtime import amx as _amx

AS_STOCK = {"QAP_DISABLE": "1", "QAP_STOCK_ENCODER": "1"}
TOKENS = 16  # of an image: 28 pixels wide, patches of 7

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip, defaults": ({}, {"mmproj_type": "f16", "prune": qap.PruneConfig(n_keep=4)}),
    "clip, q8_0": ({}, {"mmproj_type": "q8_0"}),
    "siglip, bf16": ({"siglip": True, "dtype": "bfloat16"}, {"mmproj_type": "bf16"}),
    "qwen2": ({"language": "Qwen2", "text": {"head_dim": 16}}, {"mmproj_type": "f32"}),
    "quantized": ({}, {"quantize": "Q4_K_M"}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_stock_handler_answers(make_llava: Any, tmp_path: Path, name: str) -> None:
    checkpoint, options = CASES[name]
    gcc = _amx.broken_by(_core, Path(str(llama_cpp.__file__)).parent / "lib")
    if gcc and "quantize" in options:
        pytest.skip(f"stock llama-cpp-python, compiled by {gcc}, ends by a signal on this CPU (AMX)")
    settings: dict[str, Any] = {"quantize": "F32", "keep_positions": False} | options
    files = convert(make_llava(**checkpoint), tmp_path, **settings)
    paths: dict[str, Any] = {"mmproj": files.mmproj, "model": files.model}
    (stock,) = run_probe("chat", settings=[{}], package=False, **paths)
    assert "error" not in stock, stock
    cells, in_cache = stock["cells"]
    assert cells == in_cache > TOKENS
    (ours,) = run_probe("chat", settings=[{}], env=AS_STOCK, **paths)
    assert ours == stock
    if "prune" in options:
        (pruned,) = run_probe("chat", settings=[{}], **paths)
        assert pruned["cells"][0] == cells - TOKENS + options["prune"].n_keep
