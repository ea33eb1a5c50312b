"""MiniCPM-V: its tokens are queries without a place in the picture. It runs whole, and says why it is not pruned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from ops.graphs import WatchedEncoder
from tiny_mmproj import tiny_resampler

WHY = "the resampler's queries (projector resampler) have no place in the picture"


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resampler") / "mmproj.gguf"
    path.write_bytes(tiny_resampler())
    return path


def picture(folder: Path) -> Path:
    from PIL import Image

    path = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


def test_it_runs_whole_and_refuses_to_be_pruned(mmproj: Path, tmp_path: Path) -> None:
    with qap.VisionModel(mmproj, qap.packaged_model().model, n_ctx=256) as vlm:
        assert WHY in str(vlm.why_not_prunable)
        image = vlm.encode(picture(tmp_path))
        assert image.features.shape == (8, 256)
        assert np.isfinite(image.features).all()
        with pytest.raises(qap.UnsupportedError, match="cannot prune this image: the resampler"):
            vlm.prune(image, qap.PruneConfig(n_keep=4))


def test_check_says_it(mmproj: Path) -> None:
    (report,) = qap.check_files(mmproj).files
    assert WHY in str(report.why_not_prunable)


def test_handlers_without_a_setting_run_it_and_with_one_say_why(
    mmproj: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = WatchedEncoder(mmproj)
    try:
        rows, _ = encoder.encode(picture(tmp_path))
        assert rows.shape == (8, 256)
        with qap.use(qap.PruneConfig(n_keep=4)), pytest.raises(AssertionError):
            encoder.encode(picture(tmp_path))
    finally:
        encoder.close()
    assert WHY in capfd.readouterr().err
