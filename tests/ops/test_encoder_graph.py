"""Scores are computed beside the encoder: its own nodes stay what they are, flash attention among them, and so do the
embeddings, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from ops.graphs import Node, WatchedEncoder

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"n_keep": 18},
    "all tokens": {"n_keep": 144},
    "attention received": {"n_keep": 18, "semantic": "attention"},
    "dynamic, q4_0": {"n_keep": 18, "alpha": "dynamic", "error": "q4_0"},
    "dpp": {"n_keep": 18, "select": "dpp"},
}


@pytest.fixture(scope="module", params=[True, False], ids=["flash", "no flash"])
def flash_attn(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def encoder(flash_attn: bool) -> Iterator[WatchedEncoder]:
    encoder = WatchedEncoder(flash_attn=flash_attn)
    yield encoder
    encoder.close()


def names(nodes: list[Node]) -> Counter[str]:
    return Counter(str(node["name"]) for node in nodes)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_scores_leave_the_encoder_alone(encoder: WatchedEncoder, flash_attn: bool, config: dict[str, Any]) -> None:
    sample = qap.packaged_model().sample
    rows, dense = encoder.encode(sample)
    n_flash = names(dense)["FLASH_ATTN_EXT"]
    with qap.use(qap.PruneConfig(**config)):
        kept, pruned = encoder.encode(sample)

    assert (n_flash > 0) == flash_attn
    assert names(pruned)["FLASH_ATTN_EXT"] == n_flash
    assert pruned[: len(dense)] == dense  # in name, types, shapes, strides and parameters
    assert len(pruned) > len(dense) + 30
    assert not any(node["name"] == "FLASH_ATTN_EXT" for node in pruned[len(dense) :])

    # every kept row is a row of the dense encode, in order; 144 of 144 are all of them
    at = [int(np.flatnonzero((rows == row).all(axis=1))[0]) for row in kept]
    assert len(kept) == config["n_keep"]
    assert at == sorted(set(at))
    if config["n_keep"] == len(rows):
        assert kept.tobytes() == rows.tobytes()


def test_every_layer_has_flash_attention() -> None:
    from qap_gguf.files.gguf import read_gguf

    layers = int(read_gguf(qap.packaged_model().mmproj).metadata["clip.vision.block_count"])
    encoder = WatchedEncoder()
    try:
        with qap.use(qap.PruneConfig(n_keep=18)):
            _, nodes = encoder.encode(qap.packaged_model().sample)
    finally:
        encoder.close()
    assert names(nodes)["FLASH_ATTN_EXT"] == layers
