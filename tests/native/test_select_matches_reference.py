"""The selectors that look at no features, topk, random and uniform, against `qap_gguf.reference`, index by index.

With many ties, and what each of them promises. dpp and divprune are in test_cosine_selectors.py, the laws that all keep
in test_select_laws.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf import reference

F32 = npt.NDArray[np.float32]
PLAIN = ("topk", "random", "uniform")
# few different values, both zeros among them: ties everywhere
TIED = hnp.arrays(np.float32, st.integers(1, 200), elements=st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0]))
ANY = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(allow_nan=False, allow_infinity=False, width=32))


@settings(max_examples=200, deadline=None)
@given(total=st.one_of(TIED, ANY), data=st.data(), method=st.sampled_from(PLAIN), seed=st.integers(0, 2**64 - 1))
def test_index_by_index(total: F32, data: st.DataObject, method: str, seed: int) -> None:
    k = data.draw(st.integers(1, total.size))
    chosen = qap.select(total, k, method=method, seed=seed)
    assert chosen.dtype == np.int32
    np.testing.assert_array_equal(chosen, reference.select(total, k, method, seed))
    assert (np.diff(chosen) > 0).all()
    assert chosen.size == k


@settings(max_examples=50, deadline=None)
@given(total=TIED, data=st.data())
def test_topk_takes_no_token_that_is_worse_than_one_left_behind(total: F32, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, total.size))
    kept = qap.select(total, k)
    left = np.setdiff1d(np.arange(total.size), kept)
    if left.size:
        worst, best = total[kept].min(), total[left].max()
        assert worst >= best
        if worst == best:  # the tie goes to the lower index
            assert kept[total[kept] == worst].max() < left[total[left] == best].min()


def test_all_equal_scores_keep_the_first_tokens() -> None:
    assert qap.select(np.zeros(577, np.float32), 64).tolist() == list(range(64))


def test_minus_zero_and_zero_are_a_tie() -> None:
    assert qap.select(np.array([-0.0, 0.0, -0.0], np.float32), 2).tolist() == [0, 1]


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("n", [1, 2, 144, 4096])
def test_all_tokens_is_the_identity(method: str, n: int) -> None:
    total = np.random.default_rng(n).random(n).astype(np.float32)
    assert qap.select(total, n, method=method, seed=5).tolist() == list(range(n))


def test_random_depends_on_the_seed_alone() -> None:
    a, b = np.zeros(144, np.float32), np.random.default_rng(0).random(144).astype(np.float32)
    first = qap.select(a, 18, method="random", seed=1)
    np.testing.assert_array_equal(first, qap.select(b, 18, method="random", seed=1))
    assert first.tolist() != qap.select(a, 18, method="random", seed=2).tolist()
    # every token has its chance: in 400 draws of an eighth each, 50 times on average (standard deviation 6.6)
    counts = np.bincount(
        np.concatenate([qap.select(a, 18, method="random", seed=s) for s in range(400)]), minlength=144
    )
    assert counts.min() >= 20
    assert counts.max() <= 85


def test_uniform_strides_are_even() -> None:
    steps = np.diff(qap.select(np.zeros(144, np.float32), 18, method="uniform"))
    assert set(steps.tolist()) == {8}
    steps = np.diff(qap.select(np.zeros(576, np.float32), 100, method="uniform"))
    assert set(steps.tolist()) <= {5, 6}


def test_native_scores_lead_to_the_tokens_of_the_reference() -> None:
    rng = np.random.default_rng(11)
    for n, d, k in ((144, 256, 18), (576, 512, 64), (49, 128, 49)):
        x = (rng.standard_normal((n, d)) * rng.uniform(0.2, 1, (n, 1))).astype(np.float32)
        semantic = rng.gamma(0.5, size=n).astype(np.float32)
        truth = reference.score(x, semantic=semantic).total
        ordered = np.sort(truth)[::-1]
        if k < n:  # a gap at the border that float32 cannot close
            assert ordered[k - 1] - ordered[k] > 1e-5
        np.testing.assert_array_equal(qap.select(qap.score(x, None, semantic).total, k), reference.topk(truth, k))
