"""The baseline of a lower resolution: grids, averages, and what the language model gets to read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qap_gguf as qap
import qap_gguf.eval as qe
from qap_gguf.errors import ConfigError
from qap_gguf.eval.made_tokens import replaced_image, replacement
from qap_gguf.eval.pool import pool, pooled_grid


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_the_smaller_grid_fits_and_wastes_little(rows: int, columns: int, data: st.DataObject) -> None:
    n_keep = data.draw(st.integers(1, rows * columns))
    h, w = pooled_grid(n_keep, (rows, columns))
    assert 1 <= h <= rows
    assert 1 <= w <= columns
    assert h * w <= n_keep
    if rows == columns:
        assert h * w > n_keep / 2


@pytest.mark.parametrize(("n_keep", "grid"), [(144, (12, 12)), (72, (8, 9)), (36, (6, 6)), (18, (3, 6)), (9, (3, 3))])
def test_grids_of_the_packaged_model(n_keep: int, grid: tuple[int, int]) -> None:
    found = pooled_grid(n_keep, (12, 12))
    assert found in (grid, grid[::-1])


def test_a_number_outside_the_grid_is_refused() -> None:
    for n_keep in (0, 145):
        with pytest.raises(ConfigError, match=r"1\.\.144"):
            pooled_grid(n_keep, (12, 12))


@given(st.integers(1, 12), st.integers(1, 12))
def test_pooling_keeps_constants_and_the_mean(h: int, w: int) -> None:
    x = np.random.default_rng(0).standard_normal((144, 3)).astype(np.float32)
    assert np.allclose(pool(np.ones((144, 2), np.float32), (12, 12), (h, w)), 1, atol=1e-6)
    got = pool(x, (12, 12), (h, w))
    assert got.shape == (h * w, 3)
    assert np.allclose(got.mean(axis=0), x.mean(axis=0), atol=1e-5)  # every token weighs the same


def test_the_same_grid_is_the_identity_and_blocks_are_means() -> None:
    x = np.random.default_rng(0).standard_normal((144, 5)).astype(np.float32)
    assert np.allclose(pool(x, (12, 12), (12, 12)), x, atol=1e-6)
    blocks = x.reshape(3, 4, 6, 2, 5).mean(axis=(1, 3)).reshape(18, 5)
    assert np.allclose(pool(x, (12, 12), (3, 6)), blocks, atol=1e-5)


def test_the_model_reads_the_pooled_tokens_and_nothing_else() -> None:
    with qap.VisionModel(n_threads=1) as vlm:
        image = vlm.encode(qap.packaged_model().sample)
        config = qap.PruneConfig(n_keep=18, select="uniform")
        shown = replaced_image(image, replacement("pool", image, 18), vlm.prune(image, config).indices)
        kept = vlm.prune(shown, config)
        smaller = pooled_grid(18, image.grid)
        assert np.array_equal(kept.features, pool(image.features, image.grid, smaller))
        with pytest.raises(ConfigError, match="expected a grid"):
            replacement("pool", dataclasses.replace(image, grid=(2, 3)), 18)


def test_equal_scores_leave_the_choice_to_the_process() -> None:
    with qap.VisionModel(n_threads=1) as vlm:
        image = vlm.encode(qap.packaged_model().sample)
    flat = replacement("dpp-flat", image, 18)
    equal = qap.reference.select(np.full(144, 0.3), 18, "dpp", features=image.features)
    assert np.array_equal(flat, image.features[equal])


def test_a_pool_row_keeps_what_its_grid_has(tmp_path: pytest.TempPathFactory) -> None:
    sample = qap.packaged_model().sample
    questions = [qe.Question(sample, "How many objects are there?", "four")]
    variants = qe.variants(["pool"], [qe.Budget(n_keep=144), qe.Budget(n_keep=17)])
    with qap.VisionModel(n_threads=1) as vlm:
        whole, part = qe.evaluate(vlm, questions, variants)
    assert (whole.n_kept, part.n_kept) == (144, 16)
    assert whole.said == ("four",)  # all tokens, averaged over nothing
