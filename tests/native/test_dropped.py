"""coverage after an early drop: what was dropped counts too, as the reference says; no other selector looks at it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from native.features import F32, relevance, tokens
from qap_gguf import _core, reference
from qap_gguf.config import SELECTORS, PruneConfig

N_LEFT = 20


def prune(cfg: PruneConfig, n_keep: int, seed: int, total: F32 | None, near: F32 | None) -> dict[str, Any]:
    """Of tokens that lie between as many that cannot be kept."""
    rows = tokens(2 * N_LEFT, 16, seed)
    return _core.prune(
        rows=rows, n_planes=1, special=[], padding=list(range(0, 2 * N_LEFT, 2)), attention=relevance(2 * N_LEFT, seed),
        received=None, prompt=None, prompt_semantic="none", params=cfg.to_params(), n_keep=n_keep, device=None,
        n_threads=1, dropped_total=total, dropped_near=near,
    )  # fmt: skip


def made(n_dropped: int, seed: int) -> tuple[F32, F32]:
    """Scores of what was dropped, and cosines with it, some of them below 0."""
    rng = np.random.default_rng(seed)
    total = rng.uniform(0, 1, n_dropped).astype(np.float32)
    return total, rng.uniform(-1, 1, (N_LEFT, n_dropped)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(n_dropped=st.integers(1, N_LEFT), n_keep=st.integers(1, N_LEFT - 1), seed=st.integers(0, 2**32))
def test_the_choice_is_the_references(n_dropped: int, n_keep: int, seed: int) -> None:
    total, near = made(n_dropped, seed)
    found = prune(PruneConfig(select="coverage"), n_keep, seed, total, near)
    left = np.arange(1, 2 * N_LEFT, 2)
    chosen = reference.select(
        found["total"][left], n_keep, "coverage", features=tokens(2 * N_LEFT, 16, seed)[left], dropped=(total, near)
    )
    np.testing.assert_array_equal(found["indices"], left[chosen])


def test_a_token_that_stands_for_all_that_was_dropped_comes_first() -> None:
    near = np.zeros((N_LEFT, N_LEFT), np.float32)
    near[7] = 1.0
    found = prune(PruneConfig(select="coverage"), 1, 0, made(N_LEFT, 0)[0], near)
    assert found["indices"].tolist() == [15]
    assert prune(PruneConfig(select="coverage"), 1, 0, None, None)["indices"].tolist() != [15]


@pytest.mark.parametrize("select", [name for name in SELECTORS if name != "coverage"])
def test_no_other_selector_looks_at_it(select: str) -> None:
    cfg = PruneConfig(select=select)
    with_them, without = prune(cfg, 5, 1, *made(9, 1)), prune(cfg, 5, 1, None, None)
    np.testing.assert_array_equal(with_them["indices"], without["indices"])


@pytest.mark.parametrize(
    ("total", "near", "words"),
    [
        (np.zeros(3, "f4"), None, r"expected shapes \(n_dropped,\) and \(20, n_dropped\)"),
        (np.zeros(3, "f4"), np.zeros((N_LEFT, 4), "f4"), "expected shapes"),
        (np.zeros(3, "f4"), np.zeros((3, N_LEFT), "f4"), "expected shapes"),
        (np.zeros((3, 1), "f4"), np.zeros((N_LEFT, 3), "f4"), "expected shapes"),
        (np.zeros(N_LEFT + 1, "f4"), np.zeros((N_LEFT, N_LEFT + 1), "f4"), "at most the 20 tokens that cannot be kept"),
        (np.full(3, np.nan, "f4"), np.zeros((N_LEFT, 3), "f4"), "finite scores of the tokens that were dropped early"),
        (np.zeros(3, "f4"), np.full((N_LEFT, 3), np.inf, "f4"), "finite cosines"),
    ],
)
def test_what_does_not_fit_is_one_line(total: F32, near: F32 | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prune(PruneConfig(select="coverage"), 5, 0, total, near)


def test_the_reference_wants_cosines_for_each_token() -> None:
    x = tokens(4, 8)
    with pytest.raises(ValueError, match=r"cosines of shape \(4, 2\), got \(2, 4\); transpose them"):
        reference.select([1, 2, 3, 4], 2, "coverage", features=x, dropped=([1, 2], np.zeros((2, 4))))
