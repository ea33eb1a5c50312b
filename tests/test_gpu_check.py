"""tools/build/gpu_check.sh as far as it goes without building anything: words, refusals, and the archive that it packs.

The check itself takes a compile of llama.cpp; docs/backends.md says where it was run.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "build" / "gpu_check.sh"
COMMIT = next(
    line.split("=")[1].strip()
    for line in (ROOT / "native" / "upstream" / "PIN").read_text(encoding="utf-8").splitlines()
    if line.startswith("commit")
)

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *map(str, words)], capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An unpacked sdist: what is packed, and what is left behind."""
    root = tmp_path / "sdist"
    llama = root / "vendor" / "llama.cpp"
    kept = ["LICENSE", "CMakeLists.txt", "cmake/a.cmake", "include/llama.h", "src/llama.cpp", "vendor/stb/stb_image.h"]
    kept += [
        "ggml/src/ggml-backend-impl.h",
        "ggml/src/ggml-cuda/a.cu",
        "ggml/src/ggml-metal/a.m",
        "tools/mtmd/clip.cpp",
    ]
    for name in [*kept, "models/vocab.gguf", "ggml/src/ggml-sycl/a.cpp", "tools/mtmd/test-1.jpeg"]:
        (llama / name).parent.mkdir(parents=True, exist_ok=True)
        (llama / name).write_text(name)
    head = root / ".git" / "modules" / "vendor" / "llama.cpp" / "HEAD"
    head.parent.mkdir(parents=True)
    head.write_text(COMMIT)
    (root / "llama_cpp").mkdir()
    (root / "llama_cpp" / "__init__.py").write_text('__version__ = "0"')
    return root


def test_help_is_the_head_of_the_script() -> None:
    done = call("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Compares a GPU with the CPU")
    for word in ("--sources", "--backend", "--build", "--pack", "nvcc"):
        assert word in done.stdout
    assert "#" not in done.stdout


def test_wrong_use_is_one_line_and_exit_2(tmp_path: Path) -> None:
    build = tmp_path / "build"
    cases: dict[str, tuple[str | Path, ...]] = {
        "--sources is needed": (),
        "unknown argument": ("--bakend", "cuda"),
        "--jobs needs a value": ("--sources", ROOT, "--jobs"),
        "expected cuda, metal, vulkan or cpu, got abacus": ("--sources", ROOT, "--backend", "abacus", "--build", build),
    }
    for why, words in cases.items():
        done = call(*words)
        assert (done.returncode, done.stdout) == (2, ""), words
        (line,) = done.stderr.splitlines()
        assert line.startswith("gpu_check: ")
        assert why in line


def test_sources_that_are_not_the_pinned_ones(tmp_path: Path) -> None:
    fake = tmp_path / "other.tar.gz"
    with tarfile.open(fake, "w:gz") as archive:
        archive.add(SCRIPT, "other/gpu_check.sh")
    for words, why in (
        (("--sources", tmp_path / "none.tar.gz"), "no such file or folder"),
        (("--sources", fake, "--pack", tmp_path / "out.tar.xz"), "expected sha256"),
        (
            ("--sources", tmp_path, "--backend", "cpu", "--build", tmp_path / "build"),
            "expected llama.cpp with ggml/src",
        ),
    ):
        done = call(*words)
        assert done.returncode == 1, done.stderr
        assert why in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs xz")
def test_the_archive_holds_what_a_build_needs(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "pinned.tar.xz"
    done = call("--sources", tree, "--pack", out)
    assert done.returncode == 0, done.stderr
    with tarfile.open(out) as archive:
        names = {member.name for member in archive if member.isfile()}
    inner = "pinned/vendor/llama.cpp/"
    assert {inner + "ggml/src/ggml-backend-impl.h", inner + "ggml/src/ggml-cuda/a.cu", inner + "src/llama.cpp"} <= names
    assert {"pinned/llama_cpp/__init__.py", "pinned/.git/modules/vendor/llama.cpp/HEAD"} <= names
    for left in ("models/vocab.gguf", "ggml/src/ggml-sycl/a.cpp", "tools/mtmd/test-1.jpeg"):
        assert inner + left not in names
    again = call("--sources", tree, "--pack", out)
    assert again.returncode == 1
    assert "exists" in again.stderr


def test_the_checker_compiles() -> None:
    """Against the headers that are here: CI cannot build it whole. One source needs a header from inside of ggml."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    fetched = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build" / "fetch_upstream.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    package = importlib.util.find_spec("llama_cpp")
    installed = Path(package.origin).parents[1] / "include" if package and package.origin else Path()
    if compiler is None or fetched.returncode != 0 or not (installed / "llama.h").is_file():
        pytest.skip("needs a compiler, upstream's sources and llama-cpp-python's headers")
    upstream = Path(fetched.stdout.splitlines()[-1])
    listed = re.findall(
        r"native/tests/[\w-]+\.cpp", (ROOT / "native/tests/gpu-check.cmake").read_text(encoding="utf-8")
    )
    assert len(listed) == 6
    for name in listed:
        if "ggml-backend-impl.h" in (ROOT / name).read_text(encoding="utf-8"):
            continue
        done = subprocess.run(
            [
                compiler, "-std=c++17", "-fsyntax-only", "-DLLAMA_SHARED", "-I", ROOT / "native/include",
                "-I", ROOT / "native/src", "-isystem", upstream / "tools/mtmd", "-isystem", upstream / "vendor",
                "-isystem", installed, ROOT / name,
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[:2000]
