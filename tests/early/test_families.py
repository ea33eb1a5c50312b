"""Early drop of letterboxed pictures in families whose tokens are several patches: whole tokens go, padding first.

Flat tiles and duplicates in families that cut pictures into tiles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qap_gguf as qap
from conftest import Converted
from dropin.gguf_copy import rewrite
from families.test_padding import FAMILY_NAMES, check_both_paths, hooked, letterboxed, picture
from qap_gguf import _core

WITH_PADDING = ("gemma-3", "internvl", "llama-4")

#: families whose tower needs every patch to its end, and what is said of it
REFUSED = {
    "gemma-4-unified": r"this encoder has no layers; use encoder_keep 1",
    "minicpm-v-4.6": r"this tower \(projector minicpmv4_6\) merges patches between its layers; use encoder_keep 1",
    "granite-4": r"\(granite4_vision\) reads windows of several layers, which need every patch; use encoder_keep 1",
}


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name: str, converted: Converted) -> None:
    with letterboxed(converted, name) as model:
        with pytest.raises(qap.UnsupportedError, match=f"encoder_keep: .*{REFUSED[name]}"):
            model.encode(picture((100, 60)), qap.PruneConfig(n_keep=4, encoder_keep=0.5))
        assert model.encode(picture((100, 60)), qap.PruneConfig(n_keep=4)).n_tokens > 4


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name not in REFUSED])
def test_whole_tokens_go_and_padding_first(name: str, converted: Converted) -> None:
    dropped, padded = 0, 0
    with letterboxed(converted, name) as model:
        for size in ((400, 60), (60, 400)):
            pixels = picture(size)
            dense = model.encode(pixels)
            for cfg in (qap.PruneConfig(n_keep=4, encoder_keep=0.5), qap.PruneConfig(n_keep=99, encoder_keep=0.3)):
                image = model.encode(pixels, cfg)
                assert image.n_left == sum(cfg.count_early(piece.n_real) for piece in image.pieces if piece.n_real)
                assert not (image.padding & ~image.dropped).any() or min(p.n_real for p in image.pieces) == 0
                np.testing.assert_array_equal(image.padding, dense.padding)
                check_both_paths(model, image, pixels, cfg)
                found = [report["early"] for _, report in hooked(model, pixels, cfg)]
                assert all(len(early) for early in found)
                dropped += int((image.dropped & ~image.padding).sum())
                padded += int(image.padding.sum())
    assert dropped > 0
    assert (padded > 0) == (name in WITH_PADDING)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["smolvlm", "internvl", "llama-4"])  # the last one's tiles have padding
def test_flat_tiles_and_duplicates(name: str, converted: Converted, tmp_path: Path) -> None:
    pixels = picture((400, 100)).copy()
    pixels[:, 150:] = 255
    flat = qap.PruneConfig(keep_ratio=0.1, skip_flat_tiles=2)

    def four_tiles(mmproj: Path) -> Path:  # else a row of them in any case
        return rewrite(mmproj, tmp_path / "mmproj.gguf", {"clip.vision.preproc_image_size": 256})

    more = {"change": four_tiles} if name == "smolvlm" else {}
    with letterboxed(converted, name, "auto", **more) as model:
        dense = model.encode(pixels)
        both = flat.replace(duplicates=2)
        for cfg in (
            flat,
            flat.replace(encoder_keep=0.5),
            flat.replace(merge="average"),
            both,
            both.replace(merge="average", alpha="dynamic"),
            both.replace(skip_flat_tiles=None),
        ):
            image = model.encode(pixels, cfg)
            empty = [piece.n_left == 0 for piece in image.pieces]
            assert any(empty) == (cfg.skip_flat_tiles is not None)
            assert not empty[-1]  # the overview
            assert image.n_left < image.n_real == dense.n_real
            check_both_paths(model, image, pixels, cfg)
            stats = qap.GenerationStats()
            prompt = f"a{_core.media_marker()}b"
            model.answers.place(prompt, [(image, model.prune(image, cfg))], stats, add_special=True)
            assert stats.n_image_kept == cfg.count(image.n_real)
            assert np.isfinite(model.last_logits()).all()
        image = model.encode(pixels, flat)
        kept = ~image.dropped
        np.testing.assert_array_equal(image.features[kept], dense.features[kept])
        assert image.received is not None
        assert dense.received is not None
        np.testing.assert_array_equal(image.received[kept], dense.received[kept])
        model.answers.place(prompt, [(image, None)], stats, add_special=True)  # all that is left
        assert stats.n_image_kept == kept.sum()
