"""tools/build/lock_requirements.py: pip's report becomes lines with digests; locks are checked. No index is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lock_requirements
from lock_requirements import faults, lock, where

WANTED = ["pybind11>=3.0", "scikit-build-core>=1.0", "tomli>=2; python_version < '3'"]


def report(**versions: str) -> dict[str, Any]:
    return {
        "install": [
            {
                "metadata": {"name": name.replace("_", "-"), "version": version},
                "download_info": {"archive_info": {"hashes": {"sha256": f"{number:064x}"}}},
            }
            for number, (name, version) in enumerate(versions.items())
        ]
    }


def test_a_lock_of_a_report() -> None:
    text = lock(report(scikit_build_core="1.2", pybind11="3.0.1"))
    zero, one = "0" * 64, "0" * 63 + "1"
    assert text.splitlines() == [
        f"# for {where()}",
        "pybind11==3.0.1 \\",
        f"    --hash=sha256:{one}",
        "scikit-build-core==1.2 \\",
        f"    --hash=sha256:{zero}",
    ]
    assert list(faults(text, WANTED)) == []


def test_what_a_check_finds() -> None:
    text = lock(report(scikit_build_core="0.9"))
    assert list(faults(text, WANTED)) == [
        "expected pybind11>=3.0, got none",
        "expected scikit-build-core>=1.0, got 0.9",
    ]
    (other,) = faults(text.replace(where(), "Python 2.7, os2, i386"), [])
    assert "got 'Python 2.7, os2, i386'" in other
    (bare,) = faults(text + "cmake==4.0\n", [])
    assert "got 'cmake==4.0" in bare


def test_a_file_without_a_digest() -> None:
    found = report(pybind11="3.0.1")
    found["install"][0]["download_info"] = {"dir_info": {}}
    with pytest.raises(SystemExit, match=r"sha256 of pybind11 3\.0\.1"):
        lock(found)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    versions = {"scikit_build_core": "1.2", "pybind11": "3.0.1", "llama_cpp_python": "0.3.36", "cmake": "4.0"}
    asked: list[str] = []

    def resolve(rows: list[str]) -> dict[str, Any]:
        asked.extend(rows)
        return report(**versions, ninja="1.13")

    monkeypatch.setattr(lock_requirements, "resolve", resolve)
    path = tmp_path / "build.lock"
    assert lock_requirements.main(["build", "--also", "twine", "-o", str(path)]) == 0
    assert {"twine", "cmake>=3.21"} <= set(asked)
    assert lock_requirements.main(["build", "--check", str(path)]) == 0
    assert lock_requirements.main(["build", "--also", "twine", "--check", str(path)]) == 1
    assert f"{path}: expected twine, got none; write it anew" in capsys.readouterr().err
