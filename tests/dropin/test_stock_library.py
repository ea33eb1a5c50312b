"""With its switches our libmtmd computes what the stock one computes, bit for bit; and no other is in the process.

The stock figures come from a child that never imports qap_gguf.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dropin.children import run_probe

Probe = Callable[..., Any]
STOCK = {"QAP_STOCK_ENCODER": "1"}


@pytest.mark.parametrize("extra", [{}, {"QAP_DISABLE": "1"}], ids=["no default", "disabled"])
def test_the_stock_encoder_is_bit_equal(
    plain_probe: Probe, stock_embeddings: dict[str, Any], extra: dict[str, str]
) -> None:
    assert stock_embeddings["shape"] == [144, 256]
    assert plain_probe("embed", env=STOCK | extra) == stock_embeddings


def test_disabled_means_that_a_default_changes_no_bit(plain_probe: Probe, stock_embeddings: dict[str, Any]) -> None:
    found = plain_probe("embed", default={"n_keep": 18}, env=STOCK | {"QAP_DISABLE": "1"})
    assert found == stock_embeddings


def test_stock_gives_all_image_tokens_of_a_relabelled_model_one_position(stock_embeddings: dict[str, Any]) -> None:
    """And says nothing: why `convert` and `--check` do, and why stock is compared with the plain model here."""
    found, ours = run_probe("embed", package=False), run_probe("embed")
    assert found["chunk"] == {"n_tokens": [144, 144], "n_pos": [144, 144], "positions": [7] * 144}
    assert ours["chunk"] == stock_embeddings["chunk"] == {
        "n_tokens": [144, 144], "n_pos": [144, 144], "positions": [*range(7, 151)],
    }  # fmt: skip


def test_switches_that_are_off_change_nothing(
    plain_probe: Probe, dense_embeddings: dict[str, Any], stock_embeddings: dict[str, Any]
) -> None:
    assert plain_probe("embed", env={"QAP_DISABLE": "0", "QAP_STOCK_ENCODER": ""}) == dense_embeddings
    # disabled hooks leave the fix of the encoder alone: it has a switch of its own
    assert plain_probe("embed", env={"QAP_DISABLE": "1"}) == dense_embeddings
    for flash in ("flash=True", "flash=False"):
        assert dense_embeddings[flash] != stock_embeddings[flash]
    assert dense_embeddings["flash=True"] != dense_embeddings["flash=False"]  # the setting arrives


def test_pruning_works_on_the_stock_encoder_too(plain_probe: Probe) -> None:
    found = plain_probe("embed", default={"n_keep": 18}, env=STOCK)
    assert found["shape"] == [18, 256]
    assert found["finite"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_copy_of_each_library_and_the_libmtmd_is_ours() -> None:
    found = run_probe("libraries")
    assert found["answers"][0]["cells"][0] > 144
    paths = [Path(path) for path in found["paths"]]
    kinds = [path.name.split(".")[0] for path in paths]
    assert len(kinds) == len(set(kinds)), paths
    assert {"libggml-base", "libllama", "libllama-common"} <= set(kinds)
    assert all("llama_cpp" in path.parts for path in paths if path.name.startswith(("libllama.", "libggml")))
    mtmd = [path for path in paths if "mtmd" in path.name]
    assert len(mtmd) == 1
    assert "llama_cpp" not in mtmd[0].parts
    assert mtmd[0].parent.name == "lib"
