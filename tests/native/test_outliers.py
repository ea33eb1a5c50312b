"""The native outlier magnitudes against `qap_gguf.reference` and against plain NumPy, on ordinary and hostile features.

NMSE and the largest error are both at most 1e-6 (native/features.py defines them); so are those of the total that
follows from the outliers alone. crest has no unit, so it is the same at every scale, from 1e-36 to 1e30.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from native.features import F32, TINY, largest, nmse, tokens
from qap_gguf import reference
from qap_gguf.config import OUTLIERS

# an independent source: the definitions, in NumPy's own words
DEFINITIONS: dict[str, Callable[[Any], Any]] = {
    "range": lambda x: np.ptp(x, axis=1),
    "absmax": lambda x: np.linalg.norm(x, ord=np.inf, axis=1),
    "crest": lambda x: np.linalg.norm(x, ord=np.inf, axis=1) / np.linalg.norm(x, axis=1) * np.sqrt(x.shape[1]),
}
HOSTILE = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20),
    elements=st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 1e30, -1e30, 1e-30, 1e-38, 1e-45]),
)


def native(x: F32, outlier: str) -> F32:
    # alpha 0 and weight 1: the total is the min-max normalised outlier magnitude
    scores = qap.score(x, qap.PruneConfig(outlier=outlier, outlier_weight=1.0, alpha=0.0), n_threads=1)
    truth = reference.minmax(scores.outlier)
    assert np.abs(scores.total - truth).max() <= 1e-6
    return scores.outlier


def test_every_name_has_a_definition() -> None:
    assert set(DEFINITIONS) == set(OUTLIERS)


@pytest.mark.parametrize("outlier", OUTLIERS)
@pytest.mark.parametrize(
    ("n", "d"), [(1, 1), (1, 256), (2, 3), (3, 128), (5, 129), (576, 64), (7, 4096), (64, 1), (33, 1000)]
)
def test_shapes(outlier: str, n: int, d: int) -> None:
    x = tokens(n, d, seed=n + d)
    got = native(x, outlier)
    assert got.dtype == np.float32
    assert got.shape == (n,)
    for want in (reference.outlier_magnitude(x, outlier), DEFINITIONS[outlier](x.astype(np.float64))):
        if d == 1 and outlier == "range":
            assert not got.any()  # max - min of one number
        else:
            assert nmse(got, want) <= 1e-6
            assert largest(got, want) <= 1e-6


@pytest.mark.parametrize("outlier", OUTLIERS)
@pytest.mark.parametrize("scale", [1e30, 1e20, 1e4, 1e-4, 1e-12, 1e-20, 1e-30, 1e-36])
def test_huge_and_tiny_features(outlier: str, scale: float) -> None:
    x = tokens(32, 96, scale=scale)
    got, want = native(x, outlier), reference.outlier_magnitude(x, outlier)
    assert nmse(got, want) <= 1e-6
    assert largest(got, want) <= 1e-6


@pytest.mark.parametrize("outlier", OUTLIERS)
def test_denormal_features(outlier: str) -> None:
    x = tokens(32, 96, scale=1e-39)
    assert x.any()
    unit = 1.0 if outlier == "crest" else TINY
    assert np.abs(native(x, outlier) - reference.outlier_magnitude(x, outlier)).max() / unit <= 1e-5


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1e30, 1e30, 1e-30])
def test_constant_features(value: float) -> None:
    x = np.full((20, 200), value, np.float32)
    assert not native(x, "range").any()
    np.testing.assert_array_equal(native(x, "absmax"), np.abs(x[:, 0]))
    np.testing.assert_allclose(native(x, "crest"), np.full(20, float(value != 0)), rtol=1e-6)


def test_crest_lies_between_a_constant_and_a_single_peak() -> None:
    x = np.zeros((3, 256), np.float32)
    x[0], x[1, 77] = -0.5, 1e-20  # a constant: 1; one peak: sqrt(256); zeros: 0
    np.testing.assert_allclose(native(x, "crest"), [1.0, 16.0, 0.0], rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(x=HOSTILE, outlier=st.sampled_from(OUTLIERS))
def test_any_mixture_of_magnitudes(x: F32, outlier: str) -> None:
    got, want = native(x, outlier), reference.outlier_magnitude(x, outlier)
    normal = np.abs(x).max(axis=1) >= TINY  # a token of denormals keeps few digits in float32
    normal |= ~x.any(axis=1)
    np.testing.assert_allclose(got[normal], want[normal], rtol=1e-6, atol=0)
    assert np.isfinite(got).all()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 50), d=st.integers(1, 60), outlier=st.sampled_from(OUTLIERS), seed=st.integers(0, 2**32 - 1))
def test_they_follow_a_permutation_of_the_tokens(n: int, d: int, outlier: str, seed: int) -> None:
    x = tokens(n, d, seed)
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_array_equal(native(x[order], outlier), native(x, outlier)[order])
