"""Early drop of letterboxed pictures in families whose tokens are several patches: whole tokens go, padding first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qap_gguf as qap
from families.test_padding import FAMILY_NAMES, check_both_paths, hooked, letterboxed, picture

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
def test_it_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with letterboxed(name, tmp_path) as model:
        with pytest.raises(qap.UnsupportedError, match=f"encoder_keep: .*{REFUSED[name]}"):
            model.encode(picture((100, 60)), qap.PruneConfig(n_keep=4, encoder_keep=0.5))
        assert model.encode(picture((100, 60)), qap.PruneConfig(n_keep=4)).n_tokens > 4


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name not in REFUSED])
def test_whole_tokens_go_and_padding_first(name: str, tmp_path: Path) -> None:
    dropped, padded = 0, 0
    with letterboxed(name, tmp_path) as model:
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
