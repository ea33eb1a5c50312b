"""The pinned version stands in four places; they agree, and the package is typed and complete."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.runtime import load as _load

ROOT = Path(__file__).resolve().parents[2]


def pin() -> dict[str, str]:
    lines = (ROOT / "native/upstream/PIN").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, value in pairs}


def test_the_pinned_version_is_the_same_everywhere() -> None:
    want = pin()["version"]
    in_pyproject = re.findall(r"llama-cpp-python==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert in_pyproject == [want, want]  # [build-system] and dependencies
    assert want == _load.LLAMA_CPP_PYTHON == _core.upstream_version
    assert want == importlib.metadata.version("llama-cpp-python")


def test_the_commit_is_that_of_the_loaded_ggml() -> None:
    assert pin()["commit"].startswith(_core.ggml_commit().removesuffix("-dirty")) or _core.ggml_commit() == "unknown"


def test_one_version_number() -> None:
    assert qap.__version__ == _core.__version__ == importlib.metadata.version("qap_gguf")


def test_the_installed_package_is_typed() -> None:
    # an editable install keeps the sources where they are, an ordinary one copies them beside _core
    assert qap.__file__ is not None
    folder = Path(qap.__file__).parent
    assert (folder / "py.typed").is_file()
    assert (folder / "_core.pyi").is_file()


def test_every_public_name_exists_and_is_documented() -> None:
    for name in qap.__all__:
        assert getattr(qap, name).__doc__, name


def test_packaged_model_stays_small() -> None:
    files = qap.packaged_model()
    total = sum(path.stat().st_size for path in (files.mmproj, files.model, files.sample))
    assert total < 25_000_000
