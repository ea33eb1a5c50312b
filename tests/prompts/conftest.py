"""What the tests of prompts share."""

from __future__ import annotations

import pytest

import qap_gguf as qap


@pytest.fixture(scope="session")
def packaged() -> qap.PackagedModel:
    return qap.packaged_model()
