"""Errors of ggml's own types against quantize-dequantize by gguf-py and by ggml itself (native/ggml_types.py).

E of each token is equal within 1e-6 relative. Two things about ggml's CPU backend are facts and not errors of ours:
- iq4_nl: a cast takes the first scale (`quantize_row_iq4_nl_ref`), a model file the best of several
  (`ggml_quantize_chunk`), so the error of a file is a little smaller. The other types are the same in both.
- q8_0: SIMD code rounds exact halves to even, the reference away from zero, and as the scale is stored in f16 the two
  neighbours are not equally far. Features with exact halves (on a coarse grid) are therefore compared with both.
"""

from __future__ import annotations

from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from native import ggml_types
from native.features import F32, relevance, tokens
from qap_gguf import reference
from qap_gguf.config import GGML_ERRORS
from qap_gguf.errors import ArrayError

TRUTH = {
    "q4_0": "gguf-py", "q4_1": "gguf-py", "q5_0": "gguf-py", "q5_1": "gguf-py", "q8_0": "gguf-py",
    "iq4_nl": "cast", "q4_K": "file", "q6_K": "file",
}  # fmt: skip
# 1 and 31 to 33 channels around a block of 32, 255 to 257 around one of 256, and true sizes
SHAPES = [(1, 1), (1, 32), (5, 31), (5, 33), (1, 255), (4, 256), (4, 257), (144, 256), (64, 200), (30, 4096), (9, 1000)]


def native(x: F32, error: str) -> F32:
    return qap.score(x, qap.PruneConfig(error=error), n_threads=1).error


def assert_same(got: F32, want: npt.NDArray[Any], x: F32) -> None:
    # relative to E; where E is zero but for rounding (a token that is its own scale), to the token's size
    unit = np.maximum(want, 1e-3 * np.abs(x).max(axis=1).astype(np.float64))
    assert np.isfinite(got).all()
    assert (np.abs(got - want)[unit > 0] / unit[unit > 0]).max(initial=0) <= 1e-6
    assert (got[unit == 0] == 0).all()


def test_every_type_has_a_truth() -> None:
    assert set(TRUTH) == set(GGML_ERRORS)


@pytest.mark.parametrize("error", GGML_ERRORS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_error_is_that_of_quantizing_and_dequantizing(error: str, n: int, d: int) -> None:
    x = tokens(n, d, seed=n + d)
    assert_same(native(x, error), ggml_types.error(x, error, TRUTH[error]), x)


@pytest.mark.parametrize("error", [name for name in GGML_ERRORS if name != "iq4_nl"])
def test_error_is_that_of_a_model_file(error: str) -> None:
    x = tokens(40, 512, seed=3)
    assert_same(native(x, error), ggml_types.error(x, error, "file"), x)


def test_iq4_nl_of_a_model_file_is_a_little_better_than_a_cast() -> None:
    x = tokens(40, 512, seed=3)
    file, cast = ggml_types.error(x, "iq4_nl", "file"), native(x, "iq4_nl")
    assert 0.85 < (file / cast).min() <= (file / cast).max() <= 1.0


def half_to_even(x: F32) -> npt.NDArray[np.float64]:
    """Error of q8_0 with exact halves rounded to even, as SIMD instructions do; the scale is stored in f16."""
    blocks = ggml_types.zero_filled(x, 32).reshape(len(x), -1, 32)
    absmax = np.abs(blocks).max(axis=2, keepdims=True)
    q = np.rint(blocks * (np.float32(127) / np.where(absmax > 0, absmax, np.float32(1))))
    back = q.astype(np.float64) * (absmax / np.float32(127)).astype(np.float16)
    return np.asarray(np.sqrt(np.square(blocks - back).sum(axis=(1, 2))))


@pytest.mark.parametrize("error", GGML_ERRORS)
def test_features_on_a_coarse_grid(error: str) -> None:
    x = np.random.default_rng(4).standard_normal((200, 64)).round(1).astype(np.float32)
    got, want = native(x, error), ggml_types.error(x, error, TRUTH[error])
    if error == "q8_0":
        even = half_to_even(x)
        assert (np.minimum(np.abs(got - even), np.abs(got - want)) <= 1e-6 * even).all()
        assert (np.abs(got - want) <= 0.02 * want).all()  # what the rounding of halves can make of it
    else:
        assert_same(got, want, x)


@pytest.mark.parametrize("error", GGML_ERRORS)
def test_zeros_fill_the_last_block_and_count_for_nothing(error: str) -> None:
    d = ggml_types.block_size(error) + 5
    x = tokens(20, d, seed=5)
    filled = ggml_types.zero_filled(x, ggml_types.block_size(error))
    assert_same(native(x, error), ggml_types.error(x, error, TRUTH[error]), x)
    # the same quantizer, but now the zeros are channels of the token, and their error is its own
    whole = native(filled, error)
    assert (whole >= native(x, error) * (1 - 1e-6)).all()
    if error in ("q4_1", "q5_1"):
        lost = gguf.quants.dequantize(
            ggml_types.quantized(x, error, "gguf-py"), gguf.GGMLQuantizationType[error.upper()]
        )
        assert np.abs(lost[:, d:]).max() > 0  # types with a minimum have no exact zero
        assert (whole > native(x, error)).any()


@pytest.mark.parametrize("error", GGML_ERRORS)
def test_group_size_does_not_matter(error: str) -> None:
    x = tokens(10, 300, seed=6)
    one = qap.score(x, qap.PruneConfig(error=error, group_size=16)).error
    np.testing.assert_array_equal(one, qap.score(x, qap.PruneConfig(error=error, group_size=128)).error)


@pytest.mark.parametrize("error", GGML_ERRORS)
@pytest.mark.parametrize("d", [1, 32, 100, 256])
def test_zeros_have_no_error_alone_and_among_others(error: str, d: int) -> None:
    assert not native(np.zeros((3, d), np.float32), error).any()
    x = tokens(12, d, seed=7)
    x[5] = 0.0
    got = native(x, error)
    assert got[5] == 0
    assert_same(got, ggml_types.error(x, error, TRUTH[error]), x)


@pytest.mark.parametrize("error", GGML_ERRORS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-7, 1e-4, 1e3, 6e4])
def test_tiny_features_vanish_and_large_ones_up_to_the_largest_f16_are_fine(error: str, scale: float) -> None:
    x = tokens(16, 300, seed=8, scale=scale)
    got = native(x, error)
    assert_same(got, ggml_types.error(x, error, TRUTH[error]), x)
    if scale <= 1e-12:  # the f16 scale is zero: all is lost
        np.testing.assert_allclose(got, np.linalg.norm(x.astype(np.float64), axis=1), rtol=1e-6)


@pytest.mark.parametrize("error", GGML_ERRORS)
@pytest.mark.parametrize("scale", [1e9, 1e15])
def test_features_beyond_f16_scales_are_refused_in_one_line_that_says_the_cure(error: str, scale: float) -> None:
    x = tokens(16, 300, seed=9)
    x[3, 70] = scale  # one channel of one token is enough
    with pytest.raises(ArrayError, match=rf"^error: {error} keeps .*f16.*; use int4$") as caught:
        qap.score(x, qap.PruneConfig(error=error))
    assert "\n" not in str(caught.value)
    assert np.isfinite(qap.score(x, qap.PruneConfig(error="int4")).error).all()  # the cure


@pytest.mark.parametrize("error", GGML_ERRORS)
@pytest.mark.parametrize("scale", [1e5, 1e6, 1e7, 1e20, 1e30])
def test_between_the_two_the_answer_is_an_error_or_that_of_ggml(error: str, scale: float) -> None:
    x = tokens(16, 300, seed=9, scale=scale)
    try:
        got = native(x, error)
    except ArrayError:
        with np.errstate(all="ignore"):
            assert not np.isfinite(ggml_types.error(x, error, "cast" if error == "iq4_nl" else "file")).all()
        return
    assert_same(got, ggml_types.error(x, error, TRUTH[error]), x)


@pytest.mark.parametrize("error", GGML_ERRORS)
def test_the_other_scores_follow_from_it(error: str) -> None:
    x, semantic = tokens(50, 300, seed=10), relevance(50)
    found = qap.score(x, qap.PruneConfig(error=error, alpha="dynamic", outlier="crest"), semantic)
    q = reference.sensitivity(found.error, found.outlier)
    alpha = reference.dynamic_alpha(q)
    assert found.alpha == pytest.approx(alpha, abs=1e-6)
    assert np.abs(found.total - reference.fuse(reference.minmax(semantic), q, alpha)).max() <= 1e-6


def test_more_bits_lose_less() -> None:
    x = tokens(64, 512, seed=11)
    mean = {error: float(native(x, error).mean()) for error in GGML_ERRORS}
    assert mean["q8_0"] < mean["q6_K"] < mean["q5_0"] < mean["q4_0"]
    assert mean["q5_1"] < mean["q4_1"] < mean["q4_0"]
    assert mean["q4_K"] < mean["q4_0"]
    assert mean["iq4_nl"] < mean["q4_0"]
