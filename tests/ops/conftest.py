"""These tests look at every encode's own graph: no picture comes from the cache of encoded ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import qap_gguf as qap


@pytest.fixture(scope="session", autouse=True)
def every_picture_is_encoded() -> Iterator[None]:
    """The same picture is encoded again for each setting."""
    qap.set_image_cache(0)
    yield
    qap.set_image_cache(None)
