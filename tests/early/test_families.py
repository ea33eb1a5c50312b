"""Early drop of letterboxed pictures in families whose tokens are several patches: whole tokens go, padding first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qap_gguf as qap
from families.test_padding import FAMILY_NAMES, check_both_paths, hooked, letterboxed, picture

WITH_PADDING = ("gemma-3", "internvl", "llama-4")


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILY_NAMES)
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
