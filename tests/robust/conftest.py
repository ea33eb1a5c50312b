"""Shared by the tests of hostile input: the packaged files, one loaded model, and the command as a child process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.children import outcome

Refuse = Callable[..., str]


@pytest.fixture(scope="session")
def packaged() -> qap.PackagedModel:
    return qap.packaged_model()


@pytest.fixture(scope="session")
def vlm() -> Iterator[qap.VisionModel]:
    """The packaged model, one thread: the tests ask short questions."""
    with qap.VisionModel(n_threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def sample(vlm: qap.VisionModel, packaged: qap.PackagedModel) -> qap.ImageEmbedding:
    """The packaged picture, encoded."""
    return vlm.encode(packaged.sample)


@pytest.fixture(scope="session")
def answer(vlm: qap.VisionModel, sample: qap.ImageEmbedding) -> str:
    """What the model says about the packaged picture, dense."""
    text = vlm.generate([sample, "How many objects are there?"])
    assert len(text) >= 3
    return text


def _run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return outcome([sys.executable, "-m", "qap_gguf", "run", "--threads", "1", "--max-tokens", "4", *words])


@pytest.fixture
def refused() -> Refuse:
    """Run `qap-gguf run WORDS`, which must end with exit 1 and one line of error; return that line."""

    def check(*words: str | Path) -> str:
        done = _run("-p", "What is it?", *words)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("no --image, so")]
        assert done.returncode == 1, (done.returncode, done.stderr)
        assert done.stdout == ""
        assert len(lines) == 1, lines
        assert lines[0].startswith("qap-gguf: error: ")
        assert "unexpected" not in lines[0]
        assert "incompatible function arguments" not in lines[0]
        return lines[0].removeprefix("qap-gguf: error: ")

    return check


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`qap-gguf run WORDS` in a child that no signal may end."""
    return _run
