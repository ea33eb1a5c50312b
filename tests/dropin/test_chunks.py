"""What libmtmd reports of a pruned image through llama-cpp-python's ctypes: counts, positions, rows, saved bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

N = 144
Probe = Callable[..., Any]


def counts(n: int, start: int = 7) -> dict[str, Any]:
    """What probe.py describes for n tokens with compact positions from `start` on."""
    return {"n_tokens": [n, n], "n_pos": [n, n], "positions": list(range(start, start + n))}


@pytest.mark.parametrize("flash", [False, True], ids=["no flash attention", "flash attention"])
def test_rows_of_a_pruned_chunk_are_bit_equal_to_those_that_prune_keeps(plain_probe: Probe, flash: bool) -> None:
    configs: list[dict[str, Any]] = [
        {"n_keep": 18},
        {"n_keep": N},
        {"n_keep": 1},
        {"n_keep": 143, "alpha": 0.0, "error": "int8", "group_size": 7},
        {"n_keep": 40, "alpha": 1.0},
        {"keep_ratio": 0.33, "alpha": "dynamic", "outlier_weight": 0.2},
        {"n_keep": 20, "semantic": "none"},
        {"n_keep": 20, "select": "random", "seed": 2**64 - 1},
        {"n_keep": 20, "select": "uniform"},
        {"n_keep": 20, "select": "dpp"},
        {"n_keep": 20, "select": "dpp", "merge": "average"},
        {"n_keep": 20, "select": "divprune"},
        {"n_keep": 20, "semantic": "attention", "outlier": "crest", "error": "q4_0"},
        {"n_keep": 20, "error": "q6_K", "outlier": "absmax"},
    ]
    results = plain_probe("fused_rows", configs=configs, flash=flash)
    assert len(results) == len(configs)
    for config, result in zip(configs, results, strict=True):
        kept = result["kept"]
        assert result["chunk"] == counts(len(kept)), config
        assert len(kept) == config.get("n_keep", 48)
        assert kept == sorted(set(kept))
        # scores in the graph, or the noted attention, change no bit of the features
        assert result["captured is plain"], config
        assert result["rows are plain"] == ("merge" not in config), config
        assert result["equal"], config
    assert results[0]["kept"] != results[4]["kept"] != results[6]["kept"]


def test_keeping_all_tokens_is_bit_equal_to_no_pruning(plain_probe: Probe, dense_embeddings: dict[str, Any]) -> None:
    full = plain_probe("embed", default={"n_keep": N})
    assert full.pop("saved") != dense_embeddings["saved"]  # it has a plan; all else is equal
    assert full == {name: value for name, value in dense_embeddings.items() if name != "saved"}
    assert full["finite"]


def test_a_saved_chunk_keeps_its_plan(plain_probe: Probe, stock_embeddings: dict[str, Any]) -> None:
    found = plain_probe("saved")
    for name in ("fresh", "loaded", "loaded after encode", "placeholder", "copy"):
        assert found[name] == counts(18), name
    assert found["dense"] == found["dense loaded"] == counts(N)
    assert found["saved again"] == [True, True]
    assert found["copy is equal"]
    assert found["prefill"] == [0, 18, 18]  # status, next position, cells
    assert found["dense bytes"] == stock_embeddings["saved"]


@pytest.mark.parametrize("settings", [{}, {"duplicates": 16}], ids=str)
def test_damaged_saves_are_refused_and_end_no_process(plain_probe: Probe, settings: dict[str, int]) -> None:
    found = plain_probe("damaged_saves", seed=3, **settings)
    assert found["whole"] == 18
    assert found["without our part"] == N  # upstream's bytes alone are a dense chunk
    assert found["cut"] == ["None"]
    assert found["refused"] > 250
    assert 0 <= found["least"] <= found["most"] <= N


def test_batches_of_images(plain_probe: Probe) -> None:
    for name, found in plain_probe("batches").items():
        assert found["equal"] == [True, True], name
        assert found["left"] == 0, name
