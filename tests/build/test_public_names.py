"""What `import qap_gguf` shows: the public names and nothing else."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(qap) == sorted([*qap.__all__, "__version__"])
    assert len(set(qap.__all__)) == len(qap.__all__)
    for name in dir(qap):
        assert getattr(qap, name) is not None, name


@pytest.mark.parametrize("name", ["eval", "bench", "chat", "convert", "reference", "errors", "pruning.clip_text"])
def test_submodules_are_imported_by_their_path(name: str) -> None:
    assert importlib.import_module(f"qap_gguf.{name}").__name__ == f"qap_gguf.{name}"
