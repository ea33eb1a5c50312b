"""An encoder's matrices where ggml's faster kernels read them: which ones, when not, and that results stay the same.

Every family is compared in tests/families/test_parity.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.files.gguf import read_gguf

PIXELS = np.random.default_rng(7).integers(0, 256, (192, 192, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def llama() -> Iterator[llama_cpp.Llama]:
    llama = llama_cpp.Llama(str(qap.packaged_model().model), n_ctx=512, n_threads=1, verbose=False)
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("types")
    packaged = qap.packaged_model().mmproj
    return {kind: qap.requantize(packaged, folder / f"{kind}.gguf", kind).path for kind in ("f32", "q4_0", "iq4_nl")}


@contextmanager
def opened(mmproj: Path, llama: Any) -> Iterator[Any]:
    with qap.VisionModel(mmproj, llama, n_threads=1) as vlm:
        yield vlm._encoder


def nmse(got: Any, want: Any) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


def has_kernels() -> bool:
    """Whether this CPU has faster kernels for q4_0: ggml_repack_get_optimal_repack_type() in ggml-cpu/repack.cpp."""
    features = _core.system_info()
    return "REPACK = 1" in features and any(f"{name} = 1" in features for name in ("AVX2", "DOTPROD", "MATMUL_INT8"))


@pytest.mark.skipif(not has_kernels(), reason="ggml has no faster kernels for q4_0 on this CPU")
@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl"])
def test_products_are_repacked_and_give_the_same(
    files: dict[str, Path], llama: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    products = set(_core.mmproj_products(str(files[kind])))
    sizes = {name: n for name, (_, n) in read_gguf(files[kind]).tensors.items()}
    with opened(files[kind], llama) as encoder:
        assert encoder.repacked_bytes == sum(sizes[name] for name in products)
        faster = encoder.encode(PIXELS, hidden=False)
    monkeypatch.setenv("QAP_ENCODER_REPACK", "0")
    with opened(files[kind], llama) as encoder:
        assert encoder.repacked_bytes == 0
        plain = encoder.encode(PIXELS, hidden=False)
    error = nmse(faster.features, plain.features)
    print(f"\n{kind}: NMSE of faster kernels {error:.1e}")
    assert error < 1e-4
    assert nmse(faster.attention, plain.attention) < 1e-2  # a softmax sharpens differences


@pytest.mark.parametrize("variable", ["QAP_STOCK_ENCODER", "QAP_DISABLE"])
def test_upstreams_encoder_stays_as_it_is(
    files: dict[str, Path], llama: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with opened(files["q4_0"], llama) as encoder:
        assert encoder.repacked_bytes == 0


def test_types_without_faster_kernels_are_not_touched(files: dict[str, Path], llama: Any) -> None:
    with opened(files["f32"], llama) as encoder:
        assert encoder.repacked_bytes == 0


@pytest.mark.skipif(not has_kernels(), reason="ggml has no faster kernels for q4_0 on this CPU")
def test_kept_embeddings_of_one_are_not_taken_for_the_others(
    files: dict[str, Path], llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for value in ("1", "0"):
        monkeypatch.setenv("QAP_ENCODER_REPACK", value)
        with opened(files["q4_0"], llama) as encoder:
            names.append(encoder.identity(hidden=False, lasting=True))
    assert names[0] != names[1]


def test_an_early_drop_and_a_cached_picture_go_with_it(files: dict[str, Path], llama: Any) -> None:
    config = qap.PruneConfig(n_keep=16, encoder_keep=0.5)
    with qap.VisionModel(files["q4_0"], llama, n_threads=1) as vlm:
        first = vlm.encode(PIXELS, config)
        again = vlm.encode(PIXELS, config)
        kept = vlm.prune(first, config)
    assert len(kept.indices) == 16
    np.testing.assert_array_equal(first.features, again.features)


def test_products_are_the_matrices_of_the_tower_and_the_projector() -> None:
    names = set(_core.mmproj_products(str(qap.packaged_model().mmproj)))
    assert {"mm.0.weight", "mm.2.weight", "v.blk.0.attn_q.weight", "v.blk.0.ffn_down.weight"} <= names
    assert all(name.startswith(("v.blk.", "mm.")) and name.endswith(".weight") for name in names)
    assert not any(".ln" in name or "_norm" in name for name in names)
