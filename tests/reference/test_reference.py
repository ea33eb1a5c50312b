"""Scores of the NumPy reference: values by hand, a direct triple loop, and properties that hold for any input."""

from __future__ import annotations

import ast
import doctest
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qap_gguf import reference as ref
from qap_gguf.config import GGML_ERRORS
from qap_gguf.reference import checks, scores, selection

HUGE = float(np.float32(1e30))
F32 = NDArray[np.float32]

features = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.floats(-HUGE, HUGE, width=32) | st.floats(-4, 4, width=32) | st.sampled_from([0.0, 1e-30, -1e-30]),
)


def nmse(got: NDArray[np.float64], want: NDArray[np.float64]) -> float:
    """Squared error over the squared size of `want`; 0 for two zero vectors."""
    scale = max(float(np.abs(want).max()), 1e-300)  # 1e30 squared 12 times over is no trouble, 1e-200 would be
    g, w = got / scale, want / scale
    return float(np.square(g - w).sum() / max(float(np.square(w).sum()), 1e-300))


# --- golden values, by hand -------------------------------------------------------------------------------------------


def test_int4_error_by_hand() -> None:
    # Row 0: s = 7 / 7 = 1, q = (7, 1, -2), lost: (0, 0, 0.25). Row 1: s = 2, steps (-7, 1.5, 0.25) less the dust of the
    # epsilon, q = (-7, 1, 0), Q = (-14, 2, 0), lost: (0, 1, 0.5). Row 2 is zero: nothing is lost.
    x = np.array([[7, 1, -2.25], [-14, 3, 0.5], [0, 0, 0]], np.float32)
    assert ref.quantization_error(x).tolist() == pytest.approx([0.25, math.sqrt(1 + 0.25), 0.0], rel=1e-12)


def test_the_last_shorter_group_has_its_own_scale() -> None:
    # Groups of two: (7, 0.5 -> 0): 0.5 lost. (14, 3.25 -> 2 * 2 = 4): 0.75 lost. 0.875 alone: s = 0.125, nothing lost.
    x = np.array([[7, 0.5, 14, 3.25, 0.875]], np.float32)
    assert ref.quantization_error(x, group_size=2)[0] == pytest.approx(math.sqrt(0.5**2 + 0.75**2), rel=1e-7)
    # One group of five: s = 2; 7 -> 3 (3.5 less dust) -> 6; 0.5 -> 0; 14; 3.25 -> 4; 0.875 -> 0.
    want = math.sqrt(1 + 0.5**2 + 0.75**2 + 0.875**2)
    assert ref.quantization_error(x, group_size=128)[0] == pytest.approx(want, rel=1e-12)


def test_other_widths_by_hand() -> None:
    x = np.array([[1, 0.25, -0.75]], np.float32)
    # int2: one level, s = 1, q = (1, 0, -1). int3: three levels, s = 1/3, q = (3, 1, -2), Q = (1, 1/3, -2/3).
    assert ref.quantization_error(x, "int2")[0] == pytest.approx(math.hypot(0.25, 0.25), rel=1e-12)
    assert ref.quantization_error(x, "int3")[0] == pytest.approx(math.hypot(1 / 12, 1 / 12), rel=1e-12)
    assert ref.quantization_error(np.array([[127, 0.25]], np.float32), "int8")[0] == pytest.approx(0.25, rel=1e-12)


def test_the_weighted_error_by_hand() -> None:
    # s = 1, lost: (0, 0, 0.25, 0.5). The weights' mean is 4, so they count (0.5, 1.5, 2, 0): 2 * 0.25^2 is left.
    x = np.array([[7, 1, -2.25, 0.5]], np.float32)
    got = ref.quantization_error(x, "model", channel_weights=[2, 6, 8, 0])
    assert got.tolist() == pytest.approx([math.sqrt(2) * 0.25], rel=1e-12)
    s = ref.score(np.concatenate([x, 2 * x]), error="model", channel_weights=np.array([1.0, 3.0, 4.0, 0.0]))
    assert s.error.tolist() == pytest.approx([math.sqrt(2) * 0.25, math.sqrt(2) * 0.5], rel=1e-7)


@pytest.mark.parametrize("weights", [None, [1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [[1.0, 1.0]]])
def test_weights_that_cannot_be(weights: Any) -> None:
    with pytest.raises(ValueError, match="channel_weights"):
        ref.quantization_error(np.ones((3, 2), np.float32), "model", channel_weights=weights)
    with pytest.raises(ValueError, match="leave them out"):
        ref.quantization_error(np.ones((3, 2), np.float32), channel_weights=[1.0, 1.0])


def test_the_epsilon_makes_tiny_features_vanish() -> None:
    # s = 1e-30 / 7 is nothing beside 1e-8: q = 0, so everything is lost.
    x = np.array([[1e-30, -1e-30]], np.float32)
    assert ref.quantization_error(x)[0] == pytest.approx(math.sqrt(2) * 1e-30, rel=1e-6)
    # s = 1e-9, steps = 7e-9 / 1.1e-8 = 0.64 -> 1, Q = 1e-9: 6e-9 is lost.
    assert ref.quantization_error(np.array([[7e-9]]))[0] == pytest.approx(6e-9, rel=1e-9)


def test_whole_score_by_hand() -> None:
    x = np.array([[7, 0.5], [14, 1.0], [0, 0]], np.float32)
    # E = (0.5, 1, 0), R = (6.5, 13, 0): both are (0.5, 1, 0) after min-max, and so is their mix.
    s = ref.score(x, semantic=np.array([3.0, 1.0, 2.0]), alpha=0.75, outlier_weight=0.25)
    assert s.error.tolist() == pytest.approx([0.5, 1.0, 0.0], rel=1e-6)
    assert s.outlier.tolist() == [6.5, 13.0, 0.0]
    assert s.sensitivity.tolist() == pytest.approx([0.5, 1.0, 0.0], rel=1e-6)
    assert s.semantic.tolist() == [1.0, 0.0, 0.5]
    assert s.total.tolist() == pytest.approx([0.875, 0.25, 0.375], rel=1e-6)
    assert s.alpha == 0.75


def test_sensitivity_mixes_by_the_weight() -> None:
    assert ref.sensitivity([0, 4], [8, 0], 0.25).tolist() == [0.25, 0.75]


def test_minmax_of_tiny_spans() -> None:
    assert ref.minmax([0.0, 1e-30, 5e-31]).tolist() == [0.0, 1.0, 0.5]
    # Below the smallest normal float32 the span counts as that: float32 code cannot divide by less.
    assert ref.minmax([0.0, 1.1754944e-39]).tolist() == pytest.approx([0.0, 0.1])


def test_dynamic_alpha_by_hand() -> None:
    # (0.4, 0.6): mean 0.5, std with n - 1 = sqrt(0.02), spread 0.282843, alpha = 0.55 - 0.1 * 0.082843.
    assert ref.dynamic_alpha([0.4, 0.6]) == pytest.approx(0.5417157, abs=1e-6)
    assert ref.dynamic_alpha([0.0, 1.0]) == pytest.approx(0.45)  # spread 1.41, clamped to 1
    assert ref.dynamic_alpha([0.5, 0.5]) == ref.dynamic_alpha([0.0, 0.0]) == ref.dynamic_alpha([0.3]) == 0.55
    s = ref.score(np.array([[7, 0.5], [14, 1.0], [0, 0]], np.float32), semantic=[0, 0, 1], alpha="dynamic")
    assert s.alpha == pytest.approx(0.47, abs=1e-6)  # sensitivity (0.5, 1, 0): mean 0.5, std 0.5, spread 1


def test_a_single_token_scores_zero_and_is_kept() -> None:
    s = ref.score(np.array([[1.0, -3.0, 0.25]], np.float32), semantic=[0.4])
    assert (s.total.tolist(), s.sensitivity.tolist(), s.semantic.tolist()) == ([0.0], [0.0], [0.0])
    assert s.error[0] > 0
    for method in ("topk", "dpp", "divprune", "coverage", "random", "uniform"):
        assert ref.select(s.total, 1, method, features=np.ones((1, 3))).tolist() == [0]


def test_constant_features_have_no_spread() -> None:
    s = ref.score(np.full((5, 7), 3.5, np.float32), semantic=[0.0, 1.0, 2.0, 3.0, 4.0], alpha=0.5)
    assert s.sensitivity.tolist() == [0.0] * 5
    assert s.total.tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]


def test_absmax_and_crest_by_hand() -> None:
    x = np.array([[3, -4, 0, 0], [0, 0, 0, 5], [2, 2, -2, 2], [0, 0, 0, 0]], np.float32)
    assert ref.outlier_magnitude(x, "absmax").tolist() == [4, 5, 2, 0]
    # rms: sqrt(25 / 4) = 2.5; sqrt(25 / 4) = 2.5; 2; 0, whose crest is 0 and not NaN.
    assert ref.outlier_magnitude(x, "crest").tolist() == pytest.approx([1.6, 2, 1, 0], rel=1e-15)
    assert ref.score(x, outlier="crest").outlier.tolist() == pytest.approx([1.6, 2, 1, 0], rel=1e-15)


def test_cosines_by_hand() -> None:
    x = np.array([[1, 0], [1, 1], [-2, 0], [0, 0]], np.float32)
    root = math.sqrt(0.5)
    want = np.array([[1, root, -1, 0], [root, 1, -root, 0], [-1, -root, 1, 0], [0, 0, 0, 0]], np.float64)
    np.testing.assert_allclose(ref.cosines(x), want, atol=1e-15)


# --- an independent computation ---------------------------------------------------------------------------------------


def triple_loop_error(x: F32, bits: int, group_size: int) -> list[float]:
    levels = 2 ** (bits - 1) - 1
    out = []
    for row in x:
        lost = 0.0
        for start in range(0, len(row), group_size):
            group = [float(v) for v in row[start : start + group_size]]
            scale = max(abs(v) for v in group) / levels
            for v in group:
                lost += (v - scale * math.floor(abs(v) / (scale + 1e-8) + 0.5) * math.copysign(1, v)) ** 2
        out.append(math.sqrt(lost))
    return out


@given(features, st.integers(2, 8), st.integers(1, 14))
def test_error_is_that_of_a_direct_triple_loop(x: F32, bits: int, group_size: int) -> None:
    got = ref.quantization_error(x, f"int{bits}", group_size)
    assert nmse(got, np.array(triple_loop_error(x, bits, group_size))) <= 1e-20


def test_error_is_that_of_a_direct_triple_loop_at_true_size() -> None:
    x = np.random.default_rng(5).normal(size=(6, 300)).astype(np.float32)
    assert nmse(ref.quantization_error(x), np.array(triple_loop_error(x, 4, 128))) <= 1e-24


def test_cosines_are_those_of_a_direct_loop() -> None:
    x = np.random.default_rng(6).normal(size=(9, 40)).astype(np.float32)
    x[3] = x[7]
    size = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in x]
    want = [
        [sum(float(a) * float(b) for a, b in zip(p, q, strict=True)) / (size[i] * size[j]) for j, q in enumerate(x)]
        for i, p in enumerate(x)
    ]
    got = ref.cosines(x)
    np.testing.assert_allclose(got, want, atol=1e-14)
    np.testing.assert_array_equal(got[3, [0, 1, 2, 4]], got[7, [0, 1, 2, 4]])  # equal tokens: equal to the last bit


# --- properties -------------------------------------------------------------------------------------------------------


@given(features, st.sampled_from([0.0, 0.7, 1.0, "dynamic"]), st.floats(0, 1), st.booleans())
def test_scores_are_finite_and_in_range(x: F32, alpha: Any, weight: float, with_semantic: bool) -> None:
    p = np.abs(x[:, 0].astype(np.float64)) if with_semantic else None
    s = ref.score(x, semantic=p, alpha=alpha, outlier_weight=weight)
    for part in (s.error, s.outlier, s.sensitivity, s.semantic, s.total):
        assert part.shape == (x.shape[0],)
        assert np.isfinite(part).all()
    for part in (s.sensitivity, s.semantic, s.total):
        assert part.min() >= 0
        assert part.max() <= 1 + 1e-12
    assert min(s.error.min(), s.outlier.min()) >= 0
    assert alpha != "dynamic" or 0.45 - 1e-12 <= s.alpha <= 0.55


@given(features, st.randoms(use_true_random=False), st.sampled_from([0.3, "dynamic"]))
def test_scores_follow_a_permutation_of_the_tokens(x: F32, rng: Any, alpha: Any) -> None:
    order = list(range(x.shape[0]))
    rng.shuffle(order)
    p = np.arange(x.shape[0], dtype=np.float64) ** 2
    before, after = ref.score(x, semantic=p, alpha=alpha), ref.score(x[order], semantic=p[order], alpha=alpha)
    for one, other in (
        (before.error, after.error),
        (before.outlier, after.outlier),
        (before.total, after.total),
    ):
        assert nmse(other, one[order]) <= 1e-20


@given(features)
def test_error_is_at_most_half_a_step_for_each_channel(x: F32) -> None:
    scale = np.abs(x.astype(np.float64)).max(axis=1) / 7
    # The epsilon can cost up to 7 whole steps of 1e-8 more.
    bound = (0.5 * scale + 7e-8) * math.sqrt(x.shape[1])
    assert (ref.quantization_error(x) <= bound * (1 + 1e-9)).all()


@given(features)
def test_the_outlier_magnitudes_bound_each_other(x: F32) -> None:
    span, absmax, crest = (ref.outlier_magnitude(x, name) for name in ("range", "absmax", "crest"))
    assert (span <= 2 * absmax).all()
    assert (crest[absmax > 0] >= 1 - 1e-12).all()
    assert (crest <= math.sqrt(x.shape[1]) * (1 + 1e-12)).all()
    assert (crest[absmax == 0] == 0).all()


@given(features)
def test_cosines_are_symmetric_and_in_range(x: F32) -> None:
    table = ref.cosines(x)
    np.testing.assert_array_equal(table, table.T)
    assert np.abs(table).max() <= 1 + 1e-12
    np.testing.assert_array_equal(table.diagonal(), x.any(axis=1))


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=30))
def test_minmax_stays_in_the_unit_interval_and_keeps_the_order(v: list[float]) -> None:
    out = ref.minmax(v)
    assert out.min() == 0
    assert out.max() <= 1
    assert out.max() == 1 or max(v) - min(v) < 1.2e-38
    order = np.argsort(v, kind="stable")
    assert (np.diff(out[order]) >= 0).all()


@given(features, st.data())
def test_a_token_of_better_score_is_never_left_out(x: F32, data: Any) -> None:
    k = data.draw(st.integers(1, x.shape[0]))
    total = ref.score(x).total
    kept = ref.topk(total, k)
    rest = np.setdiff1d(np.arange(x.shape[0]), kept)
    assert rest.size == 0 or total[kept].min() >= total[rest].max()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (np.zeros((2, 3), np.int32), TypeError),
        ([[1.0]], TypeError),
        (np.zeros(3, np.float32), ValueError),
        (np.zeros((0, 3), np.float32), ValueError),
        (np.zeros((3, 0), np.float32), ValueError),
        (np.array([[np.nan]], np.float32), ValueError),
        (np.array([[np.inf]], np.float32), ValueError),
        (np.array([[2e30]], np.float32), ValueError),
    ],
)
def test_bad_features_are_refused(x: Any, kind: type[Exception]) -> None:
    for function in (ref.score, ref.quantization_error, ref.outlier_magnitude, ref.cosines):
        with pytest.raises(kind, match="features must"):
            function(x)


@pytest.mark.parametrize(
    "kwargs",
    [{"alpha": -0.1}, {"alpha": math.nan}, {"alpha": "auto"}, {"alpha": True}, {"error": "int9"}, {"group_size": 0},
     {"outlier": "peak"}, {"outlier_weight": 2.0}, {"semantic": [1.0]}, {"semantic": [[1.0, 2.0]]},
     {"semantic": [math.nan, 0.0]}],
)  # fmt: skip
def test_bad_settings_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        ref.score(np.ones((2, 3), np.float32), **kwargs)


@pytest.mark.parametrize("error", GGML_ERRORS)
def test_ggml_types_are_not_in_the_reference(error: str) -> None:
    with pytest.raises(ValueError, match=r"int8, model, got .*; ggml types are ggml's own quantizers"):
        ref.quantization_error(np.ones((2, 32), np.float32), error)


# --- the modules ------------------------------------------------------------------------------------------------------

MODULES = (ref, checks, scores, selection)


def test_they_import_nothing_but_numpy() -> None:
    assert ref.__file__ is not None
    files = sorted(Path(ref.__file__).parent.glob("*.py"))
    assert len(files) == len(MODULES)
    roots = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                roots.add((node.module or "").removeprefix("qap_gguf.reference."))
    own = {"checks", "scores", "selection"}
    assert roots == own | {"__future__", "collections.abc", "numpy", "numpy.typing", "operator", "typing"}


def test_the_public_names_are_those_of_one_module() -> None:
    assert [name for name in ref.__all__ if not hasattr(ref, name)] == []
    assert {"score", "select", "topk", "Scores", "quantization_error", "cosines", "merge_average"} <= set(ref.__all__)


def test_the_examples_in_the_docstrings_run() -> None:
    results = [doctest.testmod(module) for module in MODULES]
    assert sum(result.attempted for result in results) > 12
    assert sum(result.failed for result in results) == 0
