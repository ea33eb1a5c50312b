"""Families that were not compared with their originals: pruned only with force_family, and then by their rows' places.

Their rows are those of the dense run, whatever is kept; what was not compared is the encoder itself.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.children import outcome
from ops.graphs import WatchedEncoder
from qap_gguf import _core
from tiny_mmproj import UNCOMPARED, tiny_uncompared

WHY = "this family was not compared with its original here"
FORCED = "this family was not compared with its original here; pruned because force_family is set"
ENDS = {"cogvlm", "adapter"}  # a row before the tokens and one after them
KEEP = qap.PruneConfig(n_keep=5)


def files(folder: Path, projector: str, *, side: int | None = None) -> tuple[Path, Path]:
    """The mmproj and a picture that needs no resize."""
    side = side or UNCOMPARED[projector][0]
    mmproj, picture = folder / "mmproj.gguf", folder / "picture.png"
    mmproj.write_bytes(tiny_uncompared(projector, side=side))
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    return mmproj, picture


def opened(mmproj: Path, *, force: bool, warned: bool = False) -> qap.VisionModel:
    with pytest.warns(UserWarning, match=FORCED) if force or warned else contextlib.nullcontext():
        return qap.VisionModel(mmproj, qap.packaged_model().model, n_ctx=256, n_threads=1, force_family=force)


@pytest.fixture(params=UNCOMPARED)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    return request.param, *files(tmp_path, request.param)


def test_refused_without_the_switch(family: tuple[str, Path, Path]) -> None:
    projector, mmproj, picture = family
    with opened(mmproj, force=False) as vlm:
        why = str(vlm.why_not_prunable)
        assert why.startswith(WHY)
        assert "--force-family (force_family=True, QAP_FORCE_FAMILY=1)" in why
        assert vlm.default_prune is None
        image = vlm.encode(picture)
        assert len(image.features) == UNCOMPARED[projector][1] ** 2 + 2 * (projector in ENDS)
        with pytest.raises(qap.UnsupportedError, match=f"cannot prune this image: {WHY}"):
            vlm.prune(image, KEEP)


def test_kept_rows_are_those_of_the_dense_run(family: tuple[str, Path, Path]) -> None:
    projector, mmproj, picture = family
    with opened(mmproj, force=False) as vlm:
        dense = vlm.encode(picture).features
    with opened(mmproj, force=True) as vlm:
        assert vlm.why_not_prunable is None
        image = vlm.encode(picture)
        ends = int(projector in ENDS)
        lines = UNCOMPARED[projector][1]
        assert (image.n_tokens, image.grid) == (lines**2, (lines, lines))
        np.testing.assert_array_equal(dense, image.features)
        for config in (KEEP, qap.PruneConfig(n_keep=1, select="topk"), qap.PruneConfig(keep_ratio=1.0)):
            pruned = vlm.prune(image, config)
            rows = [0] * ends + [ends + int(i) for i in pruned.indices] + [len(dense) - 1] * ends
            np.testing.assert_array_equal(pruned.features, dense[rows])
        with pytest.raises(qap.UnsupportedError, match="attention"):  # whose it is was not looked at
            vlm.prune(image, qap.PruneConfig(n_keep=5, semantic="attention"))
        with pytest.raises(qap.UnsupportedError, match=f"encoder_keep: {WHY}"):
            vlm.encode(picture, qap.PruneConfig(n_keep=5, encoder_keep=0.5))
        stream = vlm.generate([image, "What?"], prune=KEEP, max_tokens=1, stream=True)
        list(stream)
        assert stream.stats.n_image_kept == 5


def test_other_programs(family: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """libmtmd by itself, pruned while the prompt is tokenized: the same rows as through VisionModel."""
    projector, mmproj, picture = family
    monkeypatch.setenv("QAP_FORCE_FAMILY", "1")
    encoder = WatchedEncoder(mmproj)
    try:
        dense, _ = encoder.encode(picture)
        with qap.use(KEEP):
            kept, _ = encoder.encode(picture)
    finally:
        encoder.close()
    with opened(mmproj, force=False, warned=True) as vlm:
        pruned = vlm.prune(vlm.encode(picture), KEEP)
    assert len(kept) == 5 + 2 * (projector in ENDS)
    np.testing.assert_array_equal(pruned.features, kept)
    assert {row.tobytes() for row in kept} <= {row.tobytes() for row in dense}


def test_rows_without_a_place_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """9 x 9 patches, of which a GLM-Edge makes 4 x 4 tokens, while libmtmd counts 81 / 4 and aborts, dense."""
    mmproj, picture = files(tmp_path, "adapter", side=72)
    said = "expected a token for each of 16 places of the picture, got 20"
    with opened(mmproj, force=True) as vlm, pytest.raises(qap.QapError, match=said):
        vlm.encode(picture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAP_FORCE_FAMILY", "1")
        encoder = WatchedEncoder(mmproj)
        try:
            with qap.use(KEEP), pytest.raises(AssertionError):
                encoder.encode(picture)
        finally:
            encoder.close()
    assert said in capfd.readouterr().err


def test_the_command(tmp_path: Path) -> None:
    """The flag reaches whatever is loaded; without it all tokens are kept, and a wish for fewer is refused."""
    mmproj, picture = files(tmp_path, "dots_ocr")
    words = [sys.executable, "-m", "qap_gguf", "run", "--threads", "1", "--max-tokens", "1", "-p", "What?"]
    words += ["--mmproj", str(mmproj), "-m", str(qap.packaged_model().model), "--image", str(picture), "--n-keep", "4"]
    refused = outcome(words)
    assert refused.returncode == 1
    assert "--force-family" in refused.stderr
    done = outcome([*words, "--force-family"])
    assert done.returncode == 0, done.stderr
    assert f"qap-gguf: warning: {FORCED}" in done.stderr
    assert "image tokens: 4 of 16 kept" in done.stderr


def test_families_with_places_of_their_own_stay_as_they_are() -> None:
    """The switch opens nothing that has no place, and changes nothing that was compared."""
    forced, layout = set(_core.projectors("forced")), set(_core.projectors("layout"))
    assert forced & layout == set()
    assert set(UNCOMPARED) <= forced
    assert forced & {"resampler", "deepseekocr", "deepseekocr2", "deepseek4v", "yasa2"} == set()
    with qap.VisionModel(n_threads=1, n_ctx=256, force_family=True) as vlm:  # no warning
        assert vlm.why_not_prunable is None
    with pytest.raises(qap.ConfigError, match="force_family: expected True or False"):
        qap.VisionModel(force_family=1)  # type: ignore[arg-type]


def test_the_page_of_models_names_them() -> None:
    page = Path(__file__).resolve().parents[2].joinpath("docs", "models.md").read_text(encoding="utf-8")
    section = page[page.index("## Not pruned") :]
    assert {name for name in _core.projectors("forced") if f"`{name}`" not in section} == set()
