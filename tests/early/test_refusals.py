"""Families whose towers cannot drop patches early say so in one line; on small random files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from tiny_mmproj import tiny_mmproj

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
HALF = qap.PruneConfig(n_keep=1, encoder_keep=0.5)


@pytest.mark.parametrize("projector", ["idefics3", "qwen2vl_merger"])
def test_a_tower_that_can(tmp_path: Path, projector: str) -> None:
    mmproj = tmp_path / "mmproj.gguf"
    mmproj.write_bytes(tiny_mmproj(projector))
    with qap.VisionModel(mmproj, qap.packaged_model().model, n_threads=1) as vlm:
        image = vlm.encode(PIXELS, HALF.replace(n_keep=None, keep_ratio=0.25))
        assert image.kept_early is not None
        assert len(image.kept_early) < image.n_total


def test_windows_cannot(tmp_path: Path) -> None:
    mmproj = tmp_path / "mmproj.gguf"
    mmproj.write_bytes(tiny_mmproj("qwen2.5vl_merger"))
    with qap.VisionModel(mmproj, qap.packaged_model().model, n_threads=1) as vlm:
        with pytest.raises(
            qap.UnsupportedError, match="attends in windows, which need every patch; use encoder_keep 1"
        ):
            vlm.encode(PIXELS, HALF)
        assert vlm.encode(PIXELS).kept_early is None  # and goes on


def test_tiles_of_llava_next_cannot(tmp_path: Path) -> None:
    checkpoints = pytest.importorskip("families.checkpoints")
    checkpoints.llavanext(tmp_path / "ckpt")
    files = qap.convert(tmp_path / "ckpt", tmp_path / "gguf", quantize="F32", mmproj_type="f32")
    with (
        qap.VisionModel(files.mmproj, files.model, n_ctx=256, n_threads=1) as vlm,
        pytest.raises(qap.UnsupportedError, match="tiles are put together from whole ones; use encoder_keep 1"),
    ):
        vlm.encode(PIXELS, HALF)
