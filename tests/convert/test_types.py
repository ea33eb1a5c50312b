"""The mmproj's types: which tensors take them, the bytes of q8_0, and that the encoder runs with each."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

import qap_gguf as qap
from clip_text.clip_checkpoint import CASES, make_clip
from convert.test_mmproj import tensors
from qap_gguf.convert import convert
from qap_gguf.convert.output.writer import TensorPlan
from qap_gguf.errors import ConvertError
from qap_gguf.pruning.clip_text import ClipTextTower

KINDS = ["f32", "f16", "bf16", "q8_0"]
# NMSE of the tokens against f32's: rounding of weights and, for the last two, of activations too
LIMITS = {"f16": 1e-6, "bf16": 1e-4, "q8_0": 5e-4}


@pytest.fixture(scope="module")
def files(plain_llava: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out, clip = tmp_path_factory.mktemp("types"), tmp_path_factory.mktemp("clip") / "ckpt"
    make_clip(clip, texts, CASES["gelu"])
    return {
        kind: convert(
            plain_llava, out, quantize="F32", mmproj_type=kind, clip_text=clip, force=True, keep_positions=False
        )
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def encoded(files: dict[str, Any]) -> dict[str, Any]:
    pixels = np.random.default_rng(3).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    found = {}
    for kind, made in files.items():
        with qap.VisionModel(made.mmproj, made.model, n_threads=1, flash_attn=False) as vlm:
            found[kind] = vlm.encode(pixels).features
    return found


def nmse(got: Any, want: Any) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_large_matrices_only(files: dict[str, Any], kind: str) -> None:
    reader = gguf.GGUFReader(files[kind].mmproj)
    found = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    rows = {tensor.name: int(tensor.shape[0]) for tensor in reader.tensors}
    small = {name for name in found if re.search(r"\.bias$|ln\d?\.|class_embd|position_embd", name)}
    assert {found[name] for name in small} == {"F32"}
    assert found["v.patch_embd.weight"] == ("F16" if kind == "f16" else "F32")
    matrices = {name: t for name, t in found.items() if name not in small and name != "v.patch_embd.weight"}
    for name, type_name in matrices.items():
        assert type_name == ("F16" if kind == "q8_0" and rows[name] % 32 else kind.upper()), name
    field = reader.fields["general.file_type"].contents()
    assert field == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[kind]


def test_rows_that_do_not_fit_are_said(files: dict[str, Any]) -> None:
    """The tiny tower's feed-forward is 48 wide."""
    assert [files[kind].notes for kind in KINDS[:3]] == [()] * 3
    (note,) = files["q8_0"].notes
    assert re.fullmatch(r"f16 instead of q8_0, rows are no multiple of 32: \S+\.weight and \d+ more", note)


def test_bytes_of_q8_0_are_those_of_ggmls_quantizer(files: dict[str, Any]) -> None:
    from llama_cpp._ggml import libggml  # it depends on the library that has this function

    chunk = libggml.ggml_quantize_chunk
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    chunk.restype = ctypes.c_size_t
    floats, packed = tensors(files["f32"].mmproj), tensors(files["q8_0"].mmproj)
    checked = 0
    for name, tensor in packed.items():
        if tensor.tensor_type.name != "Q8_0":
            continue
        values = np.ascontiguousarray(floats[name].data, dtype="<f4")
        want = np.empty(tensor.n_bytes, np.uint8)
        source = values.ctypes.data_as(ctypes.c_void_p)
        n_rows, width = values.reshape(-1, values.shape[-1]).shape
        assert chunk(8, source, want.ctypes.data_as(ctypes.c_void_p), 0, n_rows, width, None) == want.size
        np.testing.assert_array_equal(np.asarray(tensor.data).reshape(-1), want, err_msg=name)
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("kind", list(LIMITS))
def test_the_encoder_runs_with_each(encoded: dict[str, Any], kind: str) -> None:
    error = nmse(encoded[kind], encoded["f32"])
    print(f"{kind}: NMSE to f32 {error:.1e}")
    assert 0 < error < LIMITS[kind]


@pytest.mark.parametrize("kind", list(LIMITS))
def test_the_text_tower_runs_with_each(files: dict[str, Any], kind: str) -> None:
    vectors = {}
    for name in (kind, "f32"):
        tower = ClipTextTower.open(files[name].mmproj, n_threads=1)
        assert tower is not None
        with tower:
            vectors[name] = tower.embed("Hello world")
    a, b = vectors[kind], vectors["f32"]
    assert not np.array_equal(a, b)
    assert float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) > 0.999


def test_bfloat16_checkpoints_and_large_values(make_llava: Any, tmp_path: Path) -> None:
    """bf16 to q8_0 goes by way of f32; a row is quantized as ggml does it whatever the slices."""
    plain = convert(make_llava(dtype="bfloat16"), tmp_path, quantize="F32", mmproj_type="q8_0").mmproj
    assert np.isfinite(gguf.dequantize(tensors(plain)["mm.2.weight"].data, gguf.GGMLQuantizationType.Q8_0)).all()
    values = np.random.default_rng(1).standard_normal((700, 4096)).astype("<f4")
    plan = TensorPlan("x", values, "Q8_0", values.shape)
    got = plan.values()
    assert (got.shape, got.nbytes) == ((700, 4352), plan.nbytes)
    np.testing.assert_array_equal(got, gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0))


def test_another_type_is_refused(plain_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="expected mmproj_type f32, f16, bf16, q8_0, got 'q4_0'"):
        convert(plain_llava, tmp_path / "out", mmproj_type="q4_0")


def test_the_quantizer_leaves_the_logs_as_they_were(plain_llava: Path, tmp_path: Path) -> None:
    """llama_log_set() sets ggml's callback too, which is ours."""
    from llama_cpp._ggml import libggml

    def callbacks() -> list[int | None]:
        found = []
        for library, name in ((libggml, "ggml_log_get"), (llama_cpp.llama_cpp._lib, "llama_log_get")):
            callback, data = ctypes.c_void_p(), ctypes.c_void_p()
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)((name, library))(
                ctypes.addressof(callback), ctypes.addressof(data)
            )
            found += [callback.value, data.value]
        return found

    before = callbacks()
    convert(plain_llava, tmp_path, quantize="Q8_0")
    assert callbacks() == before
