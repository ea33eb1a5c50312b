"""Shared by the tests of the drop-in: what dense embeddings are, from one child process for all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.children import run_probe


@pytest.fixture(scope="session")
def packaged_mmproj() -> Path:
    """The packaged mmproj, which carries no qap.* keys."""
    return qap.packaged_model().mmproj


@pytest.fixture(scope="session")
def plain_probe(plain_model: Path) -> Callable[..., Any]:
    """run_probe() with the language model that stock libmtmd can run: one position a token, so compact when pruned."""
    return partial(run_probe, model=plain_model)


@pytest.fixture(scope="session")
def stock_embeddings(plain_probe: Callable[..., Any]) -> dict[str, Any]:
    """Digests of what the stock libmtmd computes and saves; qap_gguf is not in that process."""
    found: dict[str, Any] = plain_probe("embed", package=False)
    return found


@pytest.fixture(scope="session")
def dense_embeddings(plain_probe: Callable[..., Any]) -> dict[str, Any]:
    """The same from our libmtmd, without any pruning."""
    found: dict[str, Any] = plain_probe("embed")
    return found
