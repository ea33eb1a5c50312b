"""These tests look at every encode's own graph: no picture comes from the cache of encoded ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import qap_gguf as qap


@pytest.fixture(scope="module", autouse=True)  # not of the session: other files set it back
def every_picture_is_encoded() -> Iterator[None]:
    """The same picture is encoded again for each setting."""
    qap.set_image_cache(0)
    yield
    qap.set_image_cache(None)
