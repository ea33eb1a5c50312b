"""Files as others made them, without our converter's corrections, and sizes that once gave NaN."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

import qap_gguf as qap
from conftest import Converted

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from families import truth  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def under_other_names(src: Path, dst: Path, old: str, new: str) -> None:
    """A copy of an mmproj file with `old` replaced by `new` in the names of tensors."""
    reader = gguf.GGUFReader(src)
    writer = gguf.GGUFWriter(dst, "clip")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name.replace(old, new), tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_4_with_its_second_norm_under_gemma_4s_name(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, _, files = converted("llama-4")
    wild = tmp_path / "wild.gguf"
    under_other_names(files.mmproj, wild, ".ln2.", ".attn_post_norm.")
    pixels = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    normal = torch.tensor(((pixels.astype("f4") / 255 - 0.5) / 0.5).transpose(2, 0, 1).copy())
    want = truth.features("llama-4", hf, normal)

    def error(path: Path) -> float:
        with qap.VisionModel(path, files.model, n_ctx=128, flash_attn=False) as vlm:
            got = vlm.encode(pixels).features
        return float(((got - want) ** 2).sum() / (want**2).sum())

    assert error(wild) <= 1e-5
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    assert error(wild) > 1e-2


def test_no_nan_over_200_sizes(converted: Converted) -> None:
    _, _, files = converted("pixtral")
    rng = np.random.default_rng(7)
    llama = llama_cpp.Llama(str(files.model), n_ctx=64, verbose=False, n_threads=1)
    with qap.VisionModel(files.mmproj, llama) as vlm:
        for _ in range(200):
            width, height = 8 * rng.integers(1, 17, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = vlm._encoder.encode(pixels, hidden=False)  # raises on NaN
            assert image.n_rows == image.n_tokens + image.pieces[0].n_special
            assert np.isfinite(image.features).all()
            # the special rows are all the same: the embedding of [IMG_BREAK]
            piece = image.pieces[0]
            special = np.setdiff1d(np.arange(piece.n_rows), piece.token_rows(range(piece.n_tokens)))
            assert (image.features[special] == image.features[special][:1]).all()
    llama.close()
