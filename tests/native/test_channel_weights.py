"""Error "model": int4 in a norm that counts each channel by its weight. Native against the reference, and its laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from native.features import F32, largest, nmse, relevance, tokens
from qap_gguf import _core, reference
from qap_gguf.errors import ArrayError, ConfigError

PARTS = ("error", "outlier", "sensitivity", "semantic", "total")
MODEL = qap.PruneConfig(error="model")


def importance(n: int, seed: int = 0) -> F32:
    """Mean squares of channels as they are: most small, a few a hundred times as large, some zero."""
    rng = np.random.default_rng(seed)
    found = rng.gamma(0.3, size=n) * np.where(rng.random(n) < 0.05, 100.0, 1.0)
    found[rng.random(n) < 0.1] = 0.0
    found[0] += 1e-3
    return found.astype(np.float32)


def both(x: F32, weights: F32, cfg: qap.PruneConfig = MODEL) -> tuple[qap.Scores, reference.Scores]:
    semantic = relevance(len(x))
    native = qap.score(x, cfg, semantic, channel_weights=weights, n_threads=1)
    truth = reference.score(
        x, semantic=semantic, alpha=cfg.alpha, error="model", group_size=cfg.group_size, channel_weights=weights
    )
    return native, truth


@pytest.mark.parametrize("group_size", [7, 64, 128, 1000])
@pytest.mark.parametrize(("n", "d"), [(48, 200), (144, 256), (9, 4096)])
def test_it_is_that_of_the_reference(group_size: int, n: int, d: int) -> None:
    native, truth = both(tokens(n, d), importance(d), MODEL.replace(group_size=group_size, alpha="dynamic"))
    for part in PARTS:
        a, b = getattr(native, part), getattr(truth, part)
        assert nmse(a, b) <= 1e-6, (part, nmse(a, b))
        assert largest(a, b) <= 1e-6, (part, largest(a, b))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), d=st.integers(2, 90), group_size=st.integers(2, 100), seed=st.integers(0, 2**32 - 1))
def test_any_size(n: int, d: int, group_size: int, seed: int) -> None:
    x, weights = tokens(n, d, seed), importance(d, seed)
    native, truth = both(x, weights, MODEL.replace(group_size=group_size))
    unit = float(np.abs(x).max()) * np.sqrt(d)
    assert np.abs(native.error - truth.error).max() <= 1e-6 * unit * np.sqrt((weights / weights.mean()).max())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    d=st.integers(1, 300),
    group_size=st.integers(1, 130),
    weight=st.sampled_from([1e-38, 1e-30, 0.1, 1.0, 3.7, 1e30, 3e38]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equal_weights_give_the_plain_error_to_the_bit(
    n: int, d: int, group_size: int, weight: float, seed: int
) -> None:
    x, weights, cfg = tokens(n, d, seed), np.full(d, weight, np.float32), qap.PruneConfig(group_size=group_size)
    plain = qap.score(x, cfg, relevance(n), n_threads=1)
    found = qap.score(x, cfg.replace(error="model"), relevance(n), channel_weights=weights, n_threads=1)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(found, part), getattr(plain, part), err_msg=part)
    truth = reference.quantization_error(x, "int4", group_size)
    np.testing.assert_array_equal(reference.quantization_error(x, "model", group_size, np.ones(d)), truth)


def test_the_unit_of_the_weights_does_not_matter() -> None:
    x, weights = tokens(30, 200), importance(200)
    plain = qap.score(x, MODEL, channel_weights=weights, n_threads=1).error
    for unit in (2.0**-100, 2.0**90):
        scaled = qap.score(x, MODEL, channel_weights=(weights * np.float32(unit)), n_threads=1).error
        np.testing.assert_allclose(scaled, plain, rtol=1e-6)


def test_a_channel_without_weight_does_not_count_and_one_alone_counts_for_all() -> None:
    x = tokens(20, 96, seed=3)
    weights = importance(96)
    weights[7] = 0.0
    other = x.copy()
    scale = np.abs(np.delete(x, 7, axis=1)).max(axis=1)  # channel 7 sets no scale, so only its own error changes
    x[:, 7], other[:, 7] = 0.4 * scale, -0.1 * scale
    np.testing.assert_array_equal(
        qap.score(x, MODEL, channel_weights=weights, n_threads=1).error,
        qap.score(other, MODEL, channel_weights=weights, n_threads=1).error,
    )
    alone = np.zeros(96, np.float32)
    alone[5] = 3.0
    step = np.abs(x.astype(np.float64)).max(axis=1) / 7
    lost = np.abs(x[:, 5] - step * np.round(x[:, 5] / (step + 1e-8)))
    got = qap.score(x, MODEL, channel_weights=alone, n_threads=1).error
    np.testing.assert_allclose(got, lost * np.sqrt(96), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_features(scale: float) -> None:
    x, weights = tokens(24, 96, scale=scale), importance(96)
    native, truth = both(x, weights, MODEL.replace(group_size=64))
    assert nmse(native.error, truth.error) <= 1e-6
    assert np.isfinite(native.total).all()


def test_a_piece_with_planes_special_rows_and_padding() -> None:
    rows, signal, weights = tokens(13, 3 * 32), relevance(12), importance(32)
    given: dict[str, Any] = {
        "rows": rows, "n_planes": 3, "special": [4], "padding": [0, 11], "attention": signal, "received": None,
        "prompt": None, "prompt_semantic": "none", "n_keep": 4, "device": None, "n_threads": 1,
    }  # fmt: skip
    found = _core.prune(**given, params=MODEL.to_params(), channel_weights=weights)
    real = np.arange(1, 11)
    x = np.ascontiguousarray(np.delete(rows, 4, axis=0)[real][:, :32])
    want = qap.score(x, MODEL, signal[real], channel_weights=weights, n_threads=1)
    for part in PARTS:
        np.testing.assert_array_equal(found[part][real], getattr(want, part), err_msg=part)
    with pytest.raises(ValueError, match=r"^channel_weights: expected 32 numbers for error model, got none$"):
        _core.prune(**given, params=MODEL.to_params())
    with pytest.raises(ValueError, match=r"^channel_weights: expected shape \(32,\), .*, got 31 numbers$"):
        _core.prune(**given, params=MODEL.to_params(), channel_weights=weights[:31].copy())


X = tokens(6, 16)


@pytest.mark.parametrize(
    ("weights", "error", "says"),
    [
        (None, ConfigError, 'expected them with error="model" and with no other, got none; pass them'),
        (np.ones(15, np.float32), ArrayError, r"channel_weights: expected shape \(16,\)"),
        (np.ones((1, 16), np.float32), ArrayError, "channel_weights: expected"),
        (np.ones(16), ArrayError, "channel_weights: expected .*float32"),
        (np.zeros(16, np.float32), ArrayError, "expected a weight above 0, got 16 that are 0"),
        (np.full(16, -1.0, np.float32), ArrayError, "expected finite numbers from 0, got -1 for channel 0"),
        (np.full(16, np.nan, np.float32), ArrayError, "channel_weights: expected finite"),
        (np.full(16, np.inf, np.float32), ArrayError, "channel_weights: expected finite"),
    ],
)
def test_weights_that_cannot_be_are_one_line(weights: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        qap.score(X, MODEL, channel_weights=weights, n_threads=1)
    assert "\n" not in str(caught.value)


def test_weights_with_another_error_are_refused() -> None:
    weights = importance(16)
    with pytest.raises(ConfigError, match="got some; leave them out"):
        qap.score(X, qap.PruneConfig(), channel_weights=weights, n_threads=1)
    with pytest.raises(ValueError, match="leave them out"):
        reference.score(X, channel_weights=weights)
