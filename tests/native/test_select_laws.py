"""Laws that every selector keeps, for any scores and features: exact K, sorted, unique, in range, nested."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf.config import SELECTORS

F32 = npt.NDArray[np.float32]
NESTED = ("topk", "random", "dpp", "divprune", "coverage")  # uniform is not: its strides move
HUGE = float(np.float32(1e30))
FINITE = st.floats(-HUGE, HUGE, width=32)
SCORE = st.one_of(st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0, 1e-38, 3e38]), st.floats(0, 1, width=32))
FEATURE = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e30, -1e30, 1e-30, 1e-45]), FINITE)


@st.composite
def images(draw: st.DrawFn) -> tuple[F32, F32]:
    """Scores (n,) and features (n, d), many ties and hostile numbers among them."""
    n = draw(st.integers(1, 16))
    total = draw(hnp.arrays(np.float32, n, elements=SCORE))
    x = draw(hnp.arrays(np.float32, (n, draw(st.integers(1, 8))), elements=FEATURE))
    return total, x


@pytest.mark.parametrize("method", SELECTORS)
@settings(max_examples=40, deadline=None)
@given(image=images(), data=st.data(), seed=st.integers(0, 2**64 - 1))
def test_exactly_k_sorted_unique_in_range_and_always_the_same(
    method: str, image: tuple[F32, F32], data: st.DataObject, seed: int
) -> None:
    total, x = image
    k = data.draw(st.integers(1, total.size))
    chosen = qap.select(total, k, x, method, seed)
    assert chosen.dtype == np.int32
    assert chosen.shape == (k,)
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < total.size
    np.testing.assert_array_equal(chosen, qap.select(total, k, x, method, seed))


@pytest.mark.parametrize("method", SELECTORS)
@settings(max_examples=20, deadline=None)
@given(image=images(), seed=st.integers(0, 2**64 - 1))
def test_all_tokens_is_the_identity(method: str, image: tuple[F32, F32], seed: int) -> None:
    total, x = image
    assert qap.select(total, total.size, x, method, seed).tolist() == list(range(total.size))


@pytest.mark.parametrize("method", NESTED)
@settings(max_examples=20, deadline=None)
@given(image=images(), seed=st.integers(0, 2**64 - 1))
def test_a_larger_k_only_adds_tokens(method: str, image: tuple[F32, F32], seed: int) -> None:
    total, x = image
    sets = [set(qap.select(total, k, x, method, seed).tolist()) for k in range(1, total.size + 1)]
    assert all(small < large for small, large in pairwise(sets))


@pytest.mark.parametrize("method", ["topk", "dpp", "coverage"])
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(8, 40), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_without_ties_the_choice_follows_a_permutation_of_the_tokens(
    method: str, n: int, d: int, seed: int, data: st.DataObject
) -> None:
    # Not so divprune: it starts from the largest distance to the nearest neighbour, and two tokens that are each
    # other's nearest share that distance: a tie in every other image.
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(1, min(n, d // 2)))  # well below the number of directions: no residual is all rounding
    x, total = rng.standard_normal((n, d)).astype(np.float32), rng.permutation(n).astype(np.float32) + 1
    order = rng.permutation(n)
    moved = qap.select(total[order], k, np.ascontiguousarray(x[order]), method)
    assert set(order[moved].tolist()) == set(qap.select(total, k, x, method).tolist())


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1e-45, 1e-30, 1e30, -1e30])
@pytest.mark.parametrize("method", SELECTORS)
def test_constant_features_and_their_scores(method: str, value: float) -> None:
    x = np.full((30, 40), value, np.float32)
    for cfg in (qap.PruneConfig(), qap.PruneConfig(alpha="dynamic", outlier="crest"), qap.PruneConfig(alpha=0.0)):
        total = qap.score(x, cfg).total
        assert np.isfinite(total).all()
        chosen = qap.select(total, 7, x, method)
        assert len(set(chosen.tolist())) == 7
        if method not in ("random", "uniform"):
            assert chosen.tolist() == list(range(7))  # nothing tells them apart: the first


@pytest.mark.parametrize("method", SELECTORS)
def test_one_token(method: str) -> None:
    for x in (np.ones((1, 1), np.float32), np.zeros((1, 5), np.float32)):
        assert qap.select(qap.score(x).total, 1, x, method).tolist() == [0]
