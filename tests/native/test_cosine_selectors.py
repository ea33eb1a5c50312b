"""dpp, divprune and coverage: native against direct computations that share no code with them, and the reference.

dpp is compared with determinants: at each step every candidate's det(L of the kept ones and it) by numpy's slogdet, in
float64, from features normalised here. divprune and coverage are compared with loops over their definitions.

Ties are decided by the lower index where they are exact: equal tokens, tokens that differ by a power of two, zeros,
equal scores. Ties between different numbers that happen to be equal on paper are decided by rounding, in float32 and
float64 not always alike; such features (small whole numbers) are left out where indices are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf import _core, reference
from qap_gguf.pruning.score import cosines

F32 = npt.NDArray[np.float32]
METHODS = ("dpp", "divprune", "coverage")


def normal(n: int, d: int, seed: int) -> tuple[F32, F32]:
    """Features (n, d) and scores (n,) without ties."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)).astype(np.float32), rng.uniform(0.05, 1.0, n).astype(np.float32)


def by_determinants(x: F32, s: F32, k: int) -> list[int]:
    rows = x.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    L = np.outer(s.astype(np.float64), s.astype(np.float64)) * (rows @ rows.T)
    kept: list[int] = []
    for _ in range(k):
        rest = [i for i in range(len(s)) if i not in kept]
        kept.append(max(rest, key=lambda i: float(np.linalg.slogdet(L[np.ix_([*kept, i], [*kept, i])])[1])))
    return sorted(kept)


def by_nested_loops(table: npt.NDArray[Any], k: int) -> list[int]:
    n = len(table)
    distance = [[float(d) if (d := np.float32(1) - c) > 1e-6 else 0.0 for c in row] for row in table]
    kept: list[int] = []
    while len(kept) < k:
        best, best_distance = -1, -1.0
        for i in range(n):
            if i in kept:
                continue
            nearest = min((distance[i][j] for j in (kept or range(n)) if j != i), default=np.inf)
            if nearest > best_distance:
                best, best_distance = i, nearest
        kept.append(best)
    return sorted(kept)


def by_what_is_covered(x: F32, s: F32, k: int) -> list[int]:
    """Each step tries every token: the sum over all tokens of rank * likeness to the most similar kept one."""
    rows = x.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = sorted(range(len(s)), key=lambda i: float(s[i]))

    def covered(kept: list[int]) -> float:
        return sum(
            (order.index(i) + 1) * max(0.0, *(float(rows[i] @ rows[j]) for j in kept), 0.0) for i in range(len(s))
        )

    kept: list[int] = []
    for _ in range(k):
        kept.append(max((i for i in range(len(s)) if i not in kept), key=lambda i: covered([*kept, i])))
    return sorted(kept)


@pytest.mark.parametrize("seed", range(40))
def test_coverage_is_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(1, 20)), int(rng.integers(3, 17))
    k = int(rng.integers(1, n + 1))
    x, s = normal(n, d, seed)
    want = by_what_is_covered(x, s, k)
    assert qap.select(s, k, x, "coverage").tolist() == want, (n, d, k)
    assert reference.select(s, k, "coverage", features=x).tolist() == want, (n, d, k)


def test_coverage_weighs_by_rank_alone() -> None:
    x, s = normal(60, 8, 7)
    for same_order in (s * np.float32(0.25), np.exp(20 * s), s - np.float32(5)):
        np.testing.assert_array_equal(qap.select(s, 9, x, "coverage"), qap.select(same_order, 9, x, "coverage"))
    assert qap.select(s, 9, x, "coverage").tolist() != qap.select(1 - s, 9, x, "coverage").tolist()


def test_coverage_keeps_one_of_what_there_is_most_of() -> None:
    # 12 tokens of background with the lowest scores, 3 objects with the highest: scores alone never see the background
    x = np.eye(4, 6, dtype=np.float32)[[0] * 12 + [1, 2, 3]]
    s = np.linspace(0.1, 1.0, 15, dtype=np.float32)
    assert qap.select(s, 3, method="topk").tolist() == [12, 13, 14]
    assert qap.select(s, 1, x, "coverage").tolist() == [0]  # ranks 1..12: 78 against 15
    assert qap.select(s, 4, x, "coverage").tolist() == [0, 12, 13, 14]


@pytest.mark.parametrize("block", range(10))
def test_dpp_is_greedy_in_the_determinant_on_200_random_cases(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(4, 25)), int(rng.integers(3, 17))
        k = int(rng.integers(1, min(n, d) + 1))
        x, s = normal(n, d, seed)
        want = by_determinants(x, s, k)
        assert qap.select(s, k, x, "dpp").tolist() == want, (seed, n, d, k)
        assert reference.select(s, k, "dpp", features=x).tolist() == want, (seed, n, d, k)


@pytest.mark.parametrize("seed", range(60))
def test_divprune_is_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(1, 30)), int(rng.integers(2, 17))
    k = int(rng.integers(1, n + 1))
    x, s = normal(n, d, seed)
    got = qap.select(s, k, x, "divprune").tolist()
    assert got == by_nested_loops(cosines(x), k)
    assert got == by_nested_loops(reference.cosines(x), k)
    assert got == reference.select(s, k, "divprune", features=x).tolist()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_divprune_is_its_definition_with_ties_when_both_see_the_same_cosines(
    n: int, d: int, seed: int, data: st.DataObject
) -> None:
    x = np.random.default_rng(seed).integers(-2, 3, (n, d)).astype(np.float32)
    k = data.draw(st.integers(1, n))
    assert qap.select(np.zeros(n, np.float32), k, x, "divprune").tolist() == by_nested_loops(cosines(x), k)


@pytest.mark.parametrize(("n", "d", "k"), [(144, 256, 18), (576, 512, 64), (100, 1024, 100), (50, 4096, 20)])
@pytest.mark.parametrize("method", METHODS)
def test_true_sizes_as_the_reference(method: str, n: int, d: int, k: int) -> None:
    x, s = normal(n, d, n + k)
    x += 0.5  # tokens have a common part: cosines around 0.2, not around 0
    np.testing.assert_array_equal(qap.select(s, k, x, method), reference.select(s, k, method, features=x))


def repeated(rng: np.random.Generator, n: int, d: int) -> Any:
    return rng.standard_normal((n, d))[rng.integers(0, n, n)]


def scaled_copies(rng: np.random.Generator, n: int, d: int) -> Any:
    return repeated(rng, n, d) * 2.0 ** rng.integers(-4, 5, (n, 1))


def with_zero_rows(rng: np.random.Generator, n: int, d: int) -> Any:
    return repeated(rng, n, d) * (rng.random((n, 1)) < 0.7)


def all_the_same(rng: np.random.Generator, n: int, d: int) -> Any:
    return np.broadcast_to(rng.standard_normal((1, d)), (n, d))


def two_directions(rng: np.random.Generator, n: int, d: int) -> Any:
    return rng.standard_normal((2, d))[rng.integers(0, 2, n)] * 4.0 ** rng.integers(-3, 4, (n, 1))


def one_hot(rng: np.random.Generator, n: int, d: int) -> Any:
    return np.eye(d)[rng.integers(0, d, n)]


def zeros(_: np.random.Generator, n: int, d: int) -> Any:
    return np.zeros((n, d))


DEGENERATE: list[Callable[[np.random.Generator, int, int], Any]] = [
    repeated, scaled_copies, with_zero_rows, all_the_same, two_directions, one_hot, zeros,
]  # fmt: skip
SCORES: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "different": lambda rng, n: rng.uniform(0, 1, n),
    "equal": lambda _, n: np.full(n, 0.3),
    "zero": lambda _, n: np.zeros(n),
    "some zero": lambda rng, n: rng.uniform(0, 1, n) * (rng.random(n) < 0.5),
    "few values": lambda rng, n: rng.integers(0, 3, n) / 2,
    "tiny": lambda rng, n: rng.uniform(0, 1e-30, n),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", DEGENERATE, ids=lambda make: str(make.__name__))
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
def test_fewer_directions_than_k(method: str, make: Any, scores: Any) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(1, 30)), int(rng.integers(1, 10))
        k = int(rng.integers(1, n + 1))
        x, s = np.ascontiguousarray(make(rng, n, d), dtype=np.float32), scores(rng, n).astype(np.float32)
        got = qap.select(s, k, x, method)
        assert got.shape == (k,)
        assert (np.diff(got) > 0).all()
        assert 0 <= got[0] <= got[-1] < n
        assert got.tolist() == reference.select(s, k, method, features=x).tolist(), (seed, n, d, k)


def test_all_equal_scores_and_tokens_keep_the_first() -> None:
    x = np.tile(np.random.default_rng(0).standard_normal(300).astype(np.float32), (50, 1))
    for method in METHODS:
        assert qap.select(np.full(50, 0.7, np.float32), 9, x, method).tolist() == list(range(9))


def test_the_last_bit_of_a_cosine_does_not_choose_among_equal_scores() -> None:
    # cos(x_i, x_i) in float32 is 1 give or take 3e-7; with equal scores token 0 must come first all the same
    x = np.random.default_rng(1).standard_normal((200, 1000)).astype(np.float32)
    diagonal = cosines(x).diagonal()
    assert diagonal.min() < diagonal.max()  # the case is real
    assert qap.select(np.full(200, 0.5, np.float32), 1, x, "dpp").tolist() == [0]


def test_dpp_keeps_apart_what_topk_keeps_together() -> None:
    x = np.eye(4, 8, dtype=np.float32).repeat(5, axis=0)  # four groups of five equal tokens
    s = np.linspace(1.0, 0.1, 20, dtype=np.float32)
    assert qap.select(s, 4).tolist() == [0, 1, 2, 3]
    assert qap.select(s, 4, x, "dpp").tolist() == [0, 5, 10, 15]
    assert qap.select(s, 4, x, "divprune").tolist() == [0, 5, 10, 15]
    assert qap.select(s, 6, x, "dpp").tolist() == [0, 1, 2, 5, 10, 15]  # nothing new is left: the best scores


def test_divprune_does_not_look_at_the_scores() -> None:
    x, s = normal(60, 32, 5)
    np.testing.assert_array_equal(qap.select(s, 9, x, "divprune"), qap.select(1 - s, 9, x, "divprune"))
    np.testing.assert_array_equal(qap.select(s, 9, x, "divprune"), qap.select(s, 9, x * np.float32(3), "divprune"))


@pytest.mark.parametrize("method", METHODS)
def test_the_native_layer_needs_what_it_says(method: str) -> None:
    x, s = normal(6, 4, 0)
    table = cosines(x)
    assert _core.needs_cosines(method)
    for total, broken in ((s, None), (s, table[:5]), (s, np.full((6, 6), np.nan, np.float32))):
        with pytest.raises(ValueError, match=r"expected|needs"):
            _core.select(total, broken, 6, 2, method, 0)
    if method != "divprune":
        with pytest.raises(ValueError, match="needs scores"):
            _core.select(None, table, 6, 2, method, 0)
    else:
        assert len(_core.select(None, table, 6, 2, method, 0)) == 2
