"""The one pruner (native/src/prune.cpp) against qap_gguf.reference, index by index: rows with special ones and padding.

What the reference gets is cut by hand: the tokens that are no padding, their main plane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from native.features import F32, relevance, tokens
from qap_gguf import _core, reference
from qap_gguf.config import MERGES, SELECTORS, PruneConfig
from qap_gguf.vision.tiles import Piece, share

WIDTH, PLANES = 48, 3
PIECE = Piece(n_tokens=60, n_columns=10, special=(10, 21, 32, 43, 54), padding=(*range(10), 12, *range(50, 60)))
PLAIN = Piece(n_tokens=60, n_columns=10)
REAL = np.setdiff1d(np.arange(60), PIECE.padding)


def rows_of(piece: Piece, seed: int = 0) -> F32:
    return tokens(piece.n_rows, WIDTH, seed)


def prune(piece: Piece, rows: F32, cfg: PruneConfig, n_keep: int, **signals: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"attention": None, "received": None, "prompt": None, "prompt_semantic": "none", **signals}
    return _core.prune(
        rows=rows, n_planes=PLANES, special=list(piece.special), padding=list(piece.padding), params=cfg.to_params(),
        n_keep=n_keep, device=None, n_threads=1, **given,
    )  # fmt: skip


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize("piece", [PIECE, PLAIN], ids=["special rows and padding", "plain"])
def test_indices_and_rows_are_those_of_the_reference(piece: Piece, select: str, merge: str) -> None:
    real = np.setdiff1d(np.arange(piece.n_tokens), piece.padding)
    for seed, n_keep in ((0, 1), (1, 7), (2, len(real) - 1)):
        rows, signal = rows_of(piece, seed), relevance(piece.n_tokens, seed)
        cfg = PruneConfig(select=select, merge=merge, seed=seed, group_size=8)
        found = prune(piece, rows, cfg, n_keep, attention=signal)
        whole = rows[piece.token_rows(real)]
        x = whole[:, : WIDTH // PLANES]
        scores = reference.score(x, semantic=signal[real], alpha=cfg.alpha, group_size=8)
        chosen = reference.select(scores.total, n_keep, features=x, method=select, seed=seed)
        np.testing.assert_array_equal(found["indices"], real[chosen])
        np.testing.assert_array_equal(found["kept"], np.union1d(piece.token_rows(real[chosen]), piece.special))
        want = rows[found["kept"]].astype(np.float64)
        if merge == "average":
            from qap_gguf.pruning.score import cosines, merge_average

            merged = merge_average(whole, cosines(np.ascontiguousarray(x)), chosen.astype(np.int32))
            want[~np.isin(found["kept"], piece.special)] = merged
        np.testing.assert_array_equal(found["rows"], want.astype(np.float32))
        for name in ("error", "outlier", "sensitivity", "semantic", "total"):
            np.testing.assert_allclose(found[name][real], getattr(scores, name), rtol=1e-4, atol=1e-5)
            assert not found[name][np.array(piece.padding, int)].any()


def test_padding_moves_no_statistic() -> None:
    """Whatever lies in the padding, NaN included, neither scores nor choice change."""
    cfg = PruneConfig(select="dpp", group_size=8)
    rows, signal = rows_of(PIECE), relevance(PIECE.n_tokens)
    want = prune(PIECE, rows, cfg, 9, received=signal)
    loud, other = rows.copy(), signal.copy()
    loud[PIECE.token_rows(PIECE.padding)] = np.nan
    other[list(PIECE.padding)] = 1e6
    got = prune(PIECE, loud, cfg, 9, received=other)
    for name in ("indices", "total", "rows"):
        np.testing.assert_array_equal(got[name], want[name])


def test_all_tokens_that_are_no_padding_are_kept_as_they_are() -> None:
    rows = rows_of(PIECE)
    found = prune(PIECE, rows, PruneConfig(merge="average"), PIECE.n_real)
    np.testing.assert_array_equal(found["indices"], REAL)
    np.testing.assert_array_equal(found["rows"], rows[PIECE.rows_of(REAL)])
    plain = rows_of(PLAIN)
    assert prune(PLAIN, plain, PruneConfig(), 60)["rows"] is plain  # the very same rows


def test_none_kept_leaves_the_special_rows_and_the_scores() -> None:
    rows = rows_of(PIECE)
    found = prune(PIECE, rows, PruneConfig(), 0)
    assert found["indices"].size == 0
    assert found["kept"].tolist() == list(PIECE.special)
    np.testing.assert_array_equal(found["total"], prune(PIECE, rows, PruneConfig(), 9)["total"])


@pytest.mark.parametrize(
    ("available", "semantic", "taken"),
    [
        (["attention", "text", "cls", "clip_text"], "auto", "clip_text"),
        (["attention", "text", "cls"], "auto", "cls"),
        (["attention", "text"], "auto", "text"),
        (["attention"], "auto", "attention"),
        ([], "auto", "none"),
        (["cls", "attention"], "attention", "attention"),
        (["cls", "attention"], "none", "none"),
    ],
)
def test_which_signal_is_taken(available: list[str], semantic: str, taken: str) -> None:
    assert _core.signal(PruneConfig(semantic=semantic).to_params(), available) == taken
    arrays = {name: relevance(60, seed) for seed, name in enumerate(available)}
    if len(set(available) & {"text", "clip_text"}) < 2:  # the caller brings one of them
        prompt = next((name for name in available if name in ("text", "clip_text")), "none")
        found = prune(
            PLAIN, rows_of(PLAIN), PruneConfig(semantic=semantic), 5, attention=arrays.get("cls"),
            received=arrays.get("attention"), prompt=arrays.get(prompt), prompt_semantic=prompt,
        )  # fmt: skip
        assert found["signal"] == taken
        best = arrays[taken].argmax() if taken in arrays else 0
        assert found["semantic"][best] == (1.0 if taken in arrays else 0.0)


def test_nothing_to_rank_by_is_an_error_only_for_selectors_that_rank() -> None:
    with pytest.raises(ValueError, match="alpha: 1 leaves nothing to rank by"):
        _core.signal(PruneConfig(alpha=1.0).to_params(), [])
    assert _core.signal(PruneConfig(alpha=1.0, select="random").to_params(), []) == "none"
    with pytest.raises(ValueError, match="cannot give text; use one of cls, attention, none"):
        _core.signal(PruneConfig(semantic="text").to_params(), ["attention", "cls"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_keep": 40}, "n_keep: expected a number in 0..39, got 40"),
        ({"n_keep": -1}, "n_keep: expected a number in 0..39, got -1"),
        ({"special": [5, 5]}, "special: expected ascending"),
        ({"special": [65]}, "special: expected ascending"),
        ({"padding": [3, 2]}, "padding: expected ascending"),
        ({"padding": [60]}, "padding: expected ascending"),
        ({"n_planes": 7}, "whole number of planes"),
        ({"n_planes": 0}, "whole number of planes"),
        ({"attention": np.zeros(59, np.float32)}, r"attention: expected shape \(60,\)"),
        ({"prompt_semantic": "best"}, "semantic: unknown name 'best'"),
        ({"prompt_semantic": "cls", "prompt": np.zeros(60, np.float32)}, "prompt_semantic: expected text or clip_text"),
    ],
)
def test_bad_pieces_are_refused_in_one_line(change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {
        "rows": rows_of(PIECE), "n_planes": PLANES, "special": list(PIECE.special), "padding": list(PIECE.padding),
        "attention": None, "received": None, "prompt": None, "prompt_semantic": "none",
        "params": PruneConfig().to_params(), "n_keep": 5, "device": None, "n_threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=says) as error:
        _core.prune(**(given | change))
    assert "\n" not in str(error.value)


def test_features_that_are_not_finite_are_refused() -> None:
    rows = rows_of(PIECE)
    rows[20, 3] = np.inf
    with pytest.raises(ValueError, match="expected finite features"):
        prune(PIECE, rows, PruneConfig(), 5)


@pytest.mark.parametrize(
    ("sizes", "n_keep", "want"),
    [
        ([16, 16, 4], 9, [4, 4, 1]),
        ([16, 16, 4], 3, [1, 1, 1]),
        ([16, 16, 4], 2, [1, 1, 0]),
        ([4, 16, 16], 1, [0, 1, 0]),
        ([5, 0, 5], 4, [2, 0, 2]),
        ([0, 3], 3, [0, 3]),
        ([100, 1, 1], 3, [1, 1, 1]),
        ([7], 7, [7]),
    ],
)
def test_shares(sizes: list[int], n_keep: int, want: list[int]) -> None:
    assert share(sizes, n_keep) == want


def test_scores_of_a_piece_of_which_nothing_is_left_are_zeros() -> None:
    """Not what the memory held before."""
    piece, rows = Piece(n_tokens=60, n_columns=10, padding=tuple(range(60))), rows_of(PLAIN)
    for _ in range(20):
        dirty = [np.full(60, 7.0, np.float32) for _ in range(40)]
        del dirty  # NumPy hands out the memory of small arrays again
        found = prune(piece, rows, PruneConfig(), 0, attention=relevance(60, 0))
        for name in ("error", "outlier", "sensitivity", "semantic", "total"):
            np.testing.assert_array_equal(found[name], np.zeros(60))
        assert found["alpha"] == np.float32(PruneConfig().alpha)
        assert found["rows"].shape == (0, WIDTH)
