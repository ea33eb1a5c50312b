"""The arithmetic of --parallel auto, against what llama.cpp allocates."""

from __future__ import annotations

import math

import llama_cpp
import pytest

import qap_gguf as qap
from qap_gguf.batch import slots
from qap_gguf.bench.memory import kv_bytes
from qap_gguf.language.opener import open_llama


@pytest.mark.parametrize("kv", [None, "q8_0", "q4_0"])
def test_a_cell_is_as_large_as_llama_cpp_has_it(kv: str | None) -> None:
    files = qap.packaged_model()
    settings = {} if kv is None else {"type_k": {"q8_0": 8, "q4_0": 2}[kv], "flash_attn": True}
    settings |= {"type_v": settings["type_k"]} if kv else {}
    llama = open_llama(files.model, n_ctx=256, n_threads=1, verbose=False, **settings)
    sizes = []
    for n in (64, 128):
        llama.n_tokens = 0
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        llama.eval(list(range(5, 5 + n)))
        sizes.append(kv_bytes(llama))
    llama.close()
    a_cell = (sizes[1] - sizes[0]) / 64
    cell = slots.cell_bytes(files.model, kv)
    assert cell <= a_cell <= cell + 64  # its position and its sequence are saved too


@pytest.mark.parametrize(
    ("free", "n_ctx", "n"),
    [(16e9, 2048, 5), (16e9, 256, 16), (16e9, 616, 16), (8e9, 616, 5), (4e9, 2048, 1), (math.inf, 2048, 2)],
)
def test_slots_of_a_7b(free: float, n_ctx: int, n: int) -> None:
    """Half of what is free beside the files, in contexts of 512 KiB a cell; one at least, sixteen at most."""
    assert slots.fitting(free, 4.4e9, 524288, n_ctx) == n


def test_fewer_tokens_more_slots() -> None:
    dense, pruned = (slots.fitting(12e9, 4.4e9, 524288, 40 + n, most=1000) for n in (576, 72))
    assert pruned / dense == pytest.approx(616 / 112, rel=0.1)


def test_no_more_slots_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    files = qap.packaged_model()
    monkeypatch.setattr(slots, "free_memory", lambda: 16e9)
    assert slots.auto_slots(files.model, files.mmproj, 512, None, "cpu", 3)[0] == 3
    n, numbers = slots.auto_slots(files.model, files.mmproj, 512, None, "cpu", 300)
    assert n == slots.MOST
    assert numbers["cell"] == slots.cell_bytes(files.model)
