"""The native scores against `qap_gguf.reference`, over the int errors and every fusion, and over hostile magnitudes.

Outliers and ggml's types have files of their own beside this one.

Two figures are bounded. NMSE = sum (a - b)^2 / sum b^2, and the largest error = max |a - b| / max(max |b|, tiny), tiny
being the smallest normal float32. Both are at most 1e-6, except for the largest error of int7 and int8: there float32
has 127 grid steps of about 6e-8 each to lose, and 5e-6 is what it can give.

Left out on purpose, because the exact answer itself depends on the last bit there:
- features between 1e-9 and 1e-4: the paper's s + 1e-8 is then neither s nor 1e-8, and E jumps where round() does;
- tokens whose E are all equal or all rounding noise (one channel, groups of one, constants, one-hot rows alone):
  min-max stretches the noise over [0, 1]. For these E is compared in units of max |x|, and what follows from it is not;
- rows of one size: their E differ so little that min-max enlarges rounding. Real tokens differ; `tokens` does too.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from native.features import F32, TINY, largest, nmse, relevance, tokens
from qap_gguf import reference
from qap_gguf.config import INT_ERRORS, OUTLIERS

PARTS = ("error", "outlier", "sensitivity", "semantic", "total")


def both(x: F32, cfg: qap.PruneConfig, semantic: F32 | None = None) -> tuple[qap.Scores, reference.Scores]:
    native = qap.score(x, cfg, semantic, n_threads=1)
    truth = reference.score(
        x, semantic=semantic, alpha=cfg.alpha, error=cfg.error, group_size=cfg.group_size,
        outlier=cfg.outlier, outlier_weight=cfg.outlier_weight,
    )  # fmt: skip
    return native, truth


def assert_equal_scores(x: F32, cfg: qap.PruneConfig, semantic: F32 | None = None, *, on_grid: bool = False) -> None:
    """`on_grid`: the exact E is (nearly) zero, so compare it in units of max |x|, and let R alone decide the rest."""
    if on_grid:
        cfg = cfg.replace(outlier_weight=1.0)
    native, truth = both(x, cfg, semantic)
    limit = 5e-6 if cfg.error in ("int7", "int8") else 1e-6
    assert native.alpha == pytest.approx(truth.alpha, abs=1e-6)
    for part in PARTS:
        a, b = getattr(native, part), getattr(truth, part)
        assert a.dtype == np.float32
        assert a.shape == (x.shape[0],)
        assert np.isfinite(a).all()
        if on_grid and part == "error":
            assert np.abs(a - b).max() <= 1e-6 * np.abs(x).max()
            continue
        if not b.any():
            assert not a.any(), part  # zeros exactly
            continue
        assert nmse(a, b) <= 1e-6, (part, nmse(a, b))
        assert largest(a, b) <= limit, (part, largest(a, b))


@pytest.mark.parametrize("error", INT_ERRORS)
@pytest.mark.parametrize("group_size", [1, 7, 64, 128, 1000])
def test_every_grid_and_group_size(error: str, group_size: int) -> None:
    x = tokens(48, 200)  # 200: the last group is shorter for 7, 64 and 128
    cfg = qap.PruneConfig(error=error, group_size=group_size)
    assert_equal_scores(x, cfg, relevance(48), on_grid=group_size == 1)  # a value alone in its group is met exactly


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0, "dynamic"])
@pytest.mark.parametrize("outlier_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("with_semantic", [True, False])
def test_every_fusion(alpha: float | Literal["dynamic"], outlier_weight: float, with_semantic: bool) -> None:
    cfg = qap.PruneConfig(alpha=alpha, outlier_weight=outlier_weight)
    assert_equal_scores(tokens(144, 256, seed=3), cfg, relevance(144) if with_semantic else None)


@pytest.mark.parametrize("scale", [1e30, 1e20, 1e4, 1e-12, 1e-20, 1e-30, 1e-36])
def test_huge_and_tiny_features(scale: float) -> None:
    for error in ("int2", "int4", "int6"):
        assert_equal_scores(tokens(32, 96, scale=scale), qap.PruneConfig(error=error, group_size=64), relevance(32))


def test_denormal_features() -> None:
    x = tokens(32, 96, scale=1e-39)
    assert x.any()
    native, truth = both(x, qap.PruneConfig(), relevance(32))
    for part in PARTS:  # 1 is the range of the last three; they are small here, because FLT_MIN is the least span
        unit = TINY if part in ("error", "outlier") else 1.0
        assert float(np.abs(getattr(native, part) - getattr(truth, part)).max()) / unit <= 1e-6, part


@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 256), (2, 3), (3, 128), (5, 129), (576, 64), (7, 4096)])
def test_shapes(n: int, d: int) -> None:
    few = d <= 3  # so few channels lie on the grid or near it by chance
    assert_equal_scores(tokens(n, d, seed=n + d), qap.PruneConfig(), relevance(n), on_grid=few)


def test_one_channel() -> None:
    x = tokens(64, 1, seed=5)
    native, truth = both(x, qap.PruneConfig(outlier_weight=1.0))
    assert not native.outlier.any()  # max - min of one number
    assert not native.total.any()
    assert np.abs(native.error - truth.error).max() <= 1e-6 * np.abs(x).max()


def test_one_token_scores_zero_in_everything_that_compares_tokens() -> None:
    native, _ = both(tokens(1, 256), qap.PruneConfig(alpha="dynamic"), relevance(1))
    assert native.alpha == pytest.approx(0.55)
    assert native.error[0] > 0
    assert not np.concatenate([native.sensitivity, native.semantic, native.total]).any()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1e30, 1e30, 1e-30, 1e-40])
def test_constant_features(value: float) -> None:
    x = np.full((20, 200), value, np.float32)
    for cfg in (qap.PruneConfig(), qap.PruneConfig(alpha="dynamic"), qap.PruneConfig(error="int8", alpha=0.0)):
        native, truth = both(x, cfg, np.full(20, 3.0, np.float32))
        assert np.abs(native.error - truth.error).max() <= 1e-6 * max(abs(value), TINY)
        assert not native.outlier.any()
        assert not native.sensitivity.any()  # equal rows: equal E, whatever its noise
        assert not native.semantic.any()
        assert not native.total.any()


def test_one_hot_rows_among_others() -> None:
    x = tokens(40, 128, seed=8)
    x[:20] = np.eye(20, 128, dtype=np.float32)
    assert_equal_scores(x, qap.PruneConfig(group_size=64), relevance(40))
    native, truth = both(np.eye(20, 128, dtype=np.float32) * 3.0, qap.PruneConfig())
    assert np.abs(native.error - truth.error).max() <= 3e-6  # on the grid: zero but for the rounding of 3
    np.testing.assert_array_equal(native.outlier, np.full(20, 3.0, np.float32))
    assert ((native.total >= 0) & (native.total <= 1)).all()


def test_a_zero_row_and_a_row_of_one_huge_number_among_ordinary_ones() -> None:
    x = tokens(30, 256, seed=9)
    x[4] = 0.0
    x[7, 11] = 1e30
    native, truth = both(x, qap.PruneConfig(alpha=0.0))
    assert native.error[4] == native.outlier[4] == 0.0
    assert int(native.total.argmax()) == int(truth.total.argmax()) == 7
    rest = np.arange(30) != 7
    assert nmse(native.error[rest], truth.error[rest]) <= 1e-6
    assert nmse(native.outlier, truth.outlier) <= 1e-6


def test_ties_in_rounding_have_the_same_error_either_way() -> None:
    # s = 1 in int4; 2.5 lies between 2 and 3, and s + 1e-8 is 1 in float32
    x = np.array([[7.0, 2.5, -2.5, 0.5, 0.0]], np.float32)
    assert both(x, qap.PruneConfig())[0].error[0] == pytest.approx(np.sqrt(0.75), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 40),
    d=st.integers(4, 80),
    group_size=st.integers(2, 100),
    error=st.sampled_from(INT_ERRORS),
    outlier=st.sampled_from(OUTLIERS),
    outlier_weight=st.floats(0, 1, width=32),
    alpha=st.one_of(st.floats(0, 1, width=32), st.just("dynamic")),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_setting(
    n: int, d: int, group_size: int, error: str, outlier: str, outlier_weight: float, alpha: Any, seed: int
) -> None:
    x, semantic = tokens(n, d, seed), relevance(n, seed)
    cfg = qap.PruneConfig(
        error=error, group_size=group_size, outlier=outlier, outlier_weight=outlier_weight, alpha=alpha
    )
    native, truth = both(x, cfg, semantic)
    for part in ("error", "outlier"):
        unit = 1.0 if (part, outlier) == ("outlier", "crest") else float(np.abs(x).max())  # crest has no unit
        assert np.abs(getattr(native, part) - getattr(truth, part)).max() <= 1e-6 * unit * np.sqrt(d), part
    for part in ("sensitivity", "semantic", "total"):
        values = getattr(native, part)
        assert ((values >= 0) & (values <= 1 + 1e-6)).all(), part
    # what follows from E and R, with the native E and R: free of the noise that min-max enlarges
    sensitivity = reference.sensitivity(native.error, native.outlier, outlier_weight)
    weight = reference.dynamic_alpha(sensitivity) if alpha == "dynamic" else alpha
    assert np.abs(native.sensitivity - sensitivity).max() <= 1e-6
    assert native.alpha == pytest.approx(weight, abs=1e-6)
    assert np.abs(native.total - reference.fuse(truth.semantic, sensitivity, weight)).max() <= 1e-6


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 50), d=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_scores_follow_a_permutation_of_the_tokens(n: int, d: int, seed: int) -> None:
    x, semantic = tokens(n, d, seed), relevance(n, seed)
    order = np.random.default_rng(seed).permutation(n)
    cfg = qap.PruneConfig(group_size=16)
    plain = qap.score(x, cfg, semantic, n_threads=1)
    moved = qap.score(np.ascontiguousarray(x[order]), cfg, np.ascontiguousarray(semantic[order]), n_threads=1)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(moved, part), getattr(plain, part)[order], err_msg=part)


def test_the_number_of_threads_changes_no_bit() -> None:
    x, semantic = tokens(576, 1024, seed=2), relevance(576)
    runs = [qap.score(x, qap.PruneConfig(alpha="dynamic"), semantic, n_threads=n) for n in (1, 2, 1, 3)]
    for other in runs[1:]:
        assert other.alpha == runs[0].alpha
        for part in PARTS:
            np.testing.assert_array_equal(getattr(other, part), getattr(runs[0], part), err_msg=part)


def test_the_named_cpu_is_the_default_device() -> None:
    x = tokens(20, 64)
    np.testing.assert_array_equal(qap.score(x, device="CPU").total, qap.score(x).total)
