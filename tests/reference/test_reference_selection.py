"""Selection and merging of the NumPy reference: values by hand, direct loops, properties, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qap_gguf import reference as ref
from qap_gguf.config import SELECTORS
from qap_gguf.reference import selection

F32 = NDArray[np.float32]
NESTED = ["topk", "random", "dpp", "divprune", "coverage"]
# Few distinct values, so that ties are common.
score_vectors = st.lists(st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, -1.0, 1e-12]), min_size=1, max_size=40)


def tokens(n: int, data: Any) -> F32:
    """Features (n, 1..6), small whole numbers: equal, parallel, opposite, orthogonal and zero tokens among them."""
    d = data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    return rng.integers(-2, 3, (n, d)).astype(np.float32)


def test_splitmix64_gives_the_published_numbers() -> None:
    golden = 0x9E3779B97F4A7C15
    stream = [selection._splitmix64((1234567 + (i + 1) * golden) % 2**64) for i in range(5)]
    assert stream == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_random_by_hand() -> None:
    # Seed 0 starts e220.., 6e78.., 06c4.., f88b.., 1b39..: the smallest are those of tokens 2, 4, 1, 0, 3.
    zeros = np.zeros(5)
    got = [ref.select(zeros, k, "random").tolist() for k in range(1, 6)]
    assert got == [[2], [2, 4], [1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
    # Around the end of the 64 bits the seed wraps, it does not fail.
    assert len(ref.select(zeros, 3, "random", seed=2**64 - 1)) == 3


def test_uniform_by_hand() -> None:
    assert ref.select(np.zeros(10), 3, "uniform").tolist() == [1, 5, 8]  # 10/6, 30/6, 50/6
    assert ref.select(np.zeros(144), 18, "uniform").tolist() == list(range(4, 144, 8))


def test_dpp_by_hand() -> None:
    # Token 1 lies at 45 degrees to both others. L_ii = 1, 0.81, s^2; after token 0: 1 adds 0.81 / 2, and 2 adds s^2.
    x = np.array([[1, 0], [1, 1], [0, 1]], np.float32)
    assert ref.select([1.0, 0.9, 0.6], 2, "dpp", features=x).tolist() == [0, 1]  # 0.405 > 0.36
    assert ref.select([1.0, 0.9, 0.7], 2, "dpp", features=x).tolist() == [0, 2]  # 0.405 < 0.49
    assert ref.select([0.9, 1.0, 0.7], 1, "dpp", features=x).tolist() == [1]


def test_dpp_fills_up_by_the_scores_when_nothing_new_is_left() -> None:
    # Two directions only: 0 (3 has the same score and a higher index), then 1; then the best scores: 3, 4, 2.
    x = np.array([[1, 0], [0, 2], [0, 3], [4, 0], [0, 0]], np.float32)
    s = [0.9, 0.5, 0.4, 0.9, 0.8]
    assert [ref.select(s, k, "dpp", features=x).tolist() for k in range(1, 6)] == [
        [0], [0, 1], [0, 1, 3], [0, 1, 3, 4], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    assert ref.select(np.zeros(5), 3, "dpp", features=x).tolist() == [0, 1, 2]  # no token adds anything


def test_coverage_by_hand() -> None:
    # Ranks 1, 2, 3. cos(0, 1) = cos(1, 2) = sqrt(1/2), cos(0, 2) = 0. Token 0 covers 1 + 1.41, token 1 covers
    # 0.71 + 2 + 2.12, token 2 covers 1.41 + 3. After token 1 token 2 adds 3 (1 - 0.71), and token 0 a third of that.
    x = np.array([[1, 0], [1, 1], [0, 1]], np.float32)
    assert [ref.select([1, 2, 3], k, "coverage", features=x).tolist() for k in (1, 2, 3)] == [[1], [1, 2], [0, 1, 2]]
    assert ref.select([3, 2, 1], 2, "coverage", features=x).tolist() == [0, 1]
    # opposite tokens do not count against each other, copies and zeros add nothing: the rest by the scores
    x = np.array([[1, 0], [-1, 0], [2, 0], [0, 0]], np.float32)
    assert ref.select([0.1, 0.2, 0.3, 0.4], 3, "coverage", features=x).tolist() == [0, 1, 3]


def test_ranks_by_hand() -> None:
    assert selection.ranks([0.3, -1.0, 0.3, 7.0, 0.3]).tolist() == [3, 1, 3, 5, 3]
    assert selection.ranks([0.0, -0.0]).tolist() == [1.5, 1.5]


def test_divprune_by_hand() -> None:
    # Angles. The nearest neighbour of 180 is 90 off, those of the others 10 or 12: 180 comes first. Then 0 (180 off),
    # then 90 (90 off both; 12 and 80 are nearer to one), then 12 (12 off; 80 is 10 off).
    x = np.array([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in (0, 12, 80, 90, 180)])
    got = [ref.select(np.zeros(5), k, "divprune", features=x).tolist() for k in range(1, 6)]
    assert got == [[4], [0, 4], [0, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]


def test_merge_by_hand() -> None:
    # Tokens 0 and 3 are kept. 1 is nearer to 0, 2 (of another length) to 3, 4 is zero: cosine 0 with both, the lower.
    x = np.array([[2, 0], [4, 1], [1, 30], [0, 6], [0, 0]], np.float32)
    np.testing.assert_allclose(ref.merge_average(x, [0, 3]), [[2, 1 / 3], [0.5, 18]], rtol=1e-15)
    np.testing.assert_array_equal(ref.merge_average(x, np.arange(5)), x)  # all kept: nothing changes
    np.testing.assert_allclose(ref.merge_average(x, [4]), x.mean(axis=0, dtype=np.float64)[None], rtol=1e-15)


# --- properties -------------------------------------------------------------------------------------------------------


@given(score_vectors, st.data())
def test_topk_is_exact_sorted_and_prefers_the_lower_index(v: list[float], data: Any) -> None:
    k = data.draw(st.integers(1, len(v)))
    got = ref.topk(v, k)
    assert got.dtype == np.int32
    # By definition: sort by (score descending, index ascending), take k, sort the indices.
    assert got.tolist() == sorted(sorted(range(len(v)), key=lambda i: (-v[i], i))[:k])


@given(score_vectors, st.sampled_from(SELECTORS), st.integers(0, 2**64 - 1), st.data())
def test_select_gives_exactly_k_sorted_unique_indices_in_range(
    v: list[float], method: str, seed: int, data: Any
) -> None:
    k = data.draw(st.integers(1, len(v)))
    x = tokens(len(v), data)
    got = ref.select(v, k, method, seed, x)
    assert got.shape == (k,)
    assert got.dtype == np.int32
    assert (np.diff(got) > 0).all()
    assert got[0] >= 0
    assert got[-1] < len(v)
    assert ref.select(v, k, method, seed, x).tolist() == got.tolist()
    assert ref.select(v, len(v), method, seed, x).tolist() == list(range(len(v)))


@given(score_vectors, st.sampled_from(NESTED), st.integers(0, 2**64 - 1), st.data())
def test_a_larger_k_only_adds_tokens(v: list[float], method: str, seed: int, data: Any) -> None:
    x = tokens(len(v), data)
    sets = [set(ref.select(v, k, method, seed, x).tolist()) for k in range(1, len(v) + 1)]
    assert all(small < large for small, large in itertools.pairwise(sets))


@given(st.integers(1, 30), st.data())
def test_merging_keeps_the_sum_of_all_tokens(n: int, data: Any) -> None:
    x = tokens(n, data)
    kept = data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True).map(sorted))
    merged = ref.merge_average(x, kept)
    assert merged.shape == (len(kept), x.shape[1])
    # Each token counts once: weighted by how many it stands for, the rows add up to what there was.
    own = ref.cosines(x)[:, kept].argmax(axis=1)
    own[kept] = np.arange(len(kept))
    count = np.bincount(own, minlength=len(kept))
    assert count.min() >= 1
    np.testing.assert_allclose(count @ merged, x.sum(axis=0, dtype=np.float64), atol=1e-12)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bad_selections_are_refused() -> None:
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
            ref.select(np.zeros(3), k)
    with pytest.raises(TypeError):
        ref.topk(np.zeros(3), 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        ref.topk([0.0, math.nan], 1)
    with pytest.raises(ValueError, match="topk, dpp, divprune, coverage, random, uniform"):
        ref.select(np.zeros(3), 1, "best")
    for method in ("dpp", "divprune", "coverage"):
        with pytest.raises(ValueError, match=f"features must be given for {method}"):
            ref.select(np.zeros(3), 1, method)
        with pytest.raises(ValueError, match="features must have 3 rows"):
            ref.select(np.zeros(3), 1, method, features=np.ones((2, 2)))
        with pytest.raises(ValueError, match="features must be finite"):
            ref.select(np.zeros(3), 1, method, features=np.full((3, 2), math.nan))
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            ref.select(np.zeros(3), 1, "random", seed)


@pytest.mark.parametrize("indices", [[], [[0]], [0.5], [-1], [3], [1, 1], [2, 0]])
def test_bad_indices_to_merge_are_refused(indices: Any) -> None:
    with pytest.raises(ValueError, match="indices must"):
        ref.merge_average(np.ones((3, 2), np.float32), np.array(indices))
