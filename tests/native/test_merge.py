"""Cosines and merging: native against direct loops and the reference, on ordinary, equal, zero and huge tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from native.features import F32, largest, nmse, tokens
from qap_gguf import reference
from qap_gguf.errors import ArrayError
from qap_gguf.pruning.score import cosines, merge_average

I32 = npt.NDArray[np.int32]


def some(n: int, k: int, seed: int) -> I32:
    return np.sort(np.random.default_rng(seed).permutation(n)[:k]).astype(np.int32)


def by_loops(x: F32, indices: I32) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Merged tokens and how many each stands for; nearest by an angle in float64."""
    rows = x.astype(np.float64)
    groups: dict[int, list[int]] = {int(j): [int(j)] for j in indices}
    for i in range(len(rows)):
        if i not in groups:
            size = [float(np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])) for j in indices]
            near = [float(rows[i] @ rows[j]) / w if w else 0.0 for j, w in zip(indices, size, strict=True)]
            groups[int(indices[near.index(max(near))])].append(i)
    merged = [sum(rows[i] for i in members) / len(members) for members in groups.values()]
    return np.array(merged), [len(members) for members in groups.values()]


@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 64), (2, 3), (17, 1), (64, 200), (144, 256), (300, 1000), (20, 4096)])
def test_cosines_as_the_reference(n: int, d: int) -> None:
    x = tokens(n, d, seed=n)
    x[n // 2] = 0.0 if n > 1 else x[n // 2]
    got, want = cosines(x), reference.cosines(x)
    assert got.dtype == np.float32
    assert nmse(got, want) <= 1e-12
    assert np.abs(got - want).max() <= 5e-7
    np.testing.assert_array_equal(got, got.T)
    assert n == 1 or not got[n // 2].any()


@pytest.mark.parametrize("scale", [1e30, 1e20, 1e-20, 1e-36])
def test_cosines_do_not_depend_on_the_scale(scale: float) -> None:
    x = tokens(20, 96, seed=1)
    assert np.abs(cosines(x * np.float32(scale)) - reference.cosines(x)).max() <= 1e-6


@pytest.mark.parametrize(("n", "d", "k"), [(2, 1, 1), (5, 3, 2), (40, 16, 7), (144, 256, 18), (300, 64, 299)])
def test_merging_as_direct_loops(n: int, d: int, k: int) -> None:
    x, indices = tokens(n, d, seed=n + k), some(n, k, seed=k)
    got = merge_average(x, cosines(x), indices)
    want, count = by_loops(x, indices)
    assert got.dtype == np.float32
    assert got.shape == (k, d)
    assert nmse(got, want) <= 1e-12
    assert largest(got, want) <= 1e-6
    np.testing.assert_allclose(reference.merge_average(x, indices), want, rtol=1e-12, atol=1e-15)
    # the weights: each token counts once
    assert sum(count) == n
    np.testing.assert_allclose(count @ got.astype(np.float64), x.sum(axis=0, dtype=np.float64), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(2, 40), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_merging_as_the_reference(n: int, d: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    x = tokens(n, d, seed)[rng.integers(0, n, n)]  # equal tokens among them, kept and dropped
    x[rng.random(n) < 0.1] = 0.0
    indices = some(n, data.draw(st.integers(1, n)), seed)
    got = merge_average(x, cosines(x), indices)
    np.testing.assert_allclose(got, reference.merge_average(x, indices), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 144])
def test_all_kept_is_the_identity_to_the_last_bit(n: int) -> None:
    x = tokens(n, 64, seed=3)
    x[-1] = x[0]  # equal tokens: each keeps its own place
    np.testing.assert_array_equal(merge_average(x, cosines(x), np.arange(n, dtype=np.int32)), x)


def test_a_kept_token_without_followers_does_not_change_by_one_bit() -> None:
    x = np.array([[0.1, 0.2, 0.0], [0.1, 0.3, 0.0], [0.0, 0.0, 0.7]], np.float32)
    got = merge_average(x, cosines(x), np.array([0, 2], np.int32))
    np.testing.assert_array_equal(got[1], x[2])
    np.testing.assert_allclose(got[0], [0.1, 0.25, 0.0], rtol=1e-6)


def test_ties_go_to_the_lower_index_and_zero_tokens_to_the_first() -> None:
    x = np.array([[1, 0], [0, 1], [0, 0], [2, 2], [0, 4]], np.float32)
    table = cosines(x)
    assert table[3, 0] == table[3, 1]
    got = merge_average(x, table, np.array([0, 1], np.int32))
    np.testing.assert_allclose(got, [[1, 2 / 3], [0, 2.5]], rtol=1e-6)  # 0 takes 2 (zeros) and 3 (a tie); 1 takes 4


def test_one_kept_token_is_the_mean_of_all_also_of_huge_ones() -> None:
    for scale in (1.0, 1e30, 1e-30):
        x = tokens(500, 16, seed=4, scale=scale)
        got = merge_average(x, cosines(x), np.array([250], np.int32))
        np.testing.assert_allclose(got[0] / scale, x.mean(axis=0, dtype=np.float64) / scale, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "indices", [[], [0, 0], [1, 0], [-1], [6], [0, 1, 2, 3, 4, 5, 5]], ids=lambda v: ",".join(map(str, v)) or "none"
)
def test_bad_indices(indices: list[int]) -> None:
    x = tokens(6, 4)
    with pytest.raises(ArrayError, match=r"indices: expected|indices of shape") as caught:
        merge_average(x, cosines(x), np.array(indices, np.int32))
    assert "\n" not in str(caught.value)


def test_bad_arrays() -> None:
    x = tokens(6, 4)
    table, two = cosines(x), np.array([0, 1], np.int32)
    bad: list[tuple[Any, Any]] = [
        (x[:5], table),
        (x, table[:5]),
        (x, table[:, :5].copy()),
        (x[0], table),
        (x, table[0]),
    ]
    for features, given_table in bad:
        with pytest.raises(ArrayError, match="expected") as caught:
            merge_average(features, given_table, two)
        assert "\n" not in str(caught.value)
    for indices in (two.astype(np.int64), two.astype(np.float32), [0, 1]):
        with pytest.raises(ArrayError):
            merge_average(x, table, indices)  # type: ignore[arg-type]
    for value in (np.nan, np.inf, 2e30):
        hostile = x.copy()
        hostile[2, 2] = value
        with pytest.raises(ArrayError, match=r"^x: expected finite"):
            cosines(hostile)
