"""A small fake upstream for the tests of fetch_upstream.py and refresh_patch.py: sdist, pin and patches.

The fake holds every path that the real selection requires, with a few lines in each.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import upstream_patches

TOOLS = Path(upstream_patches.__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOP = "llama_cpp_python-1.2.3"
CLIP = "".join(f"line {i}\n" for i in range(1, 11))
FILES = {
    "LICENSE": "MIT\n",
    "src/llama-ext.h": "// ext\n",
    "tools/mtmd/clip.cpp": CLIP,
    "tools/mtmd/mtmd.cpp": "int mtmd;\n",
    "vendor/stb/stb_image.h": "// stb\n",
    "common/chat.h": "// chat\n",
    "convert_hf_to_gguf.py": "import conversion\n",
    "conversion/__init__.py": "import gguf\n",
    "gguf-py/gguf/__init__.py": "",
    "docs/ops/CPU.csv": "op\n",
    "src/unwanted.cpp": "not needed\n",
}
HOOKS = """Why this patch exists.

diff --git a/tools/mtmd/clip.cpp b/tools/mtmd/clip.cpp
--- a/tools/mtmd/clip.cpp
+++ b/tools/mtmd/clip.cpp
@@ -1,5 +1,7 @@
 line 1
 line 2
+hook();
+++counter;
 line 3
 line 4
 line 5
"""
ENCODER = """diff --git a/tools/mtmd/mtmd.cpp b/tools/mtmd/mtmd.cpp
--- a/tools/mtmd/mtmd.cpp
+++ b/tools/mtmd/mtmd.cpp
@@ -1 +1 @@
-int mtmd;
+int mended;
"""


def sdist_files() -> dict[str, str]:
    """{path in the sdist: text}."""
    rows = {f"{TOP}/vendor/llama.cpp/{name}": text for name, text in FILES.items()}
    rows[f"{TOP}/.git/modules/vendor/llama.cpp/HEAD"] = f"{COMMIT}\n"
    rows[f"{TOP}/llama_cpp/__init__.py"] = '__version__ = "1.2.3"\n'
    return rows


def make_sdist(path: Path, extra: list[tarfile.TarInfo] | None = None) -> Path:
    """A small sdist with fixed bytes (no time stamps), plus hostile members where a test asks for them."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, text in sdist_files().items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        for member in extra or []:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


@dataclass
class Place:
    """A temporary pin, patch folder, cache and sdist, and the tool run on them."""

    root: Path
    env: dict[str, str]

    def write_pin(self, sha256: str, commit: str = COMMIT) -> None:
        rows = f"# a comment\npackage = llama-cpp-python\nversion = 1.2.3\ncommit = {commit}\nsha256 = {sha256}\n"
        (self.root / "PIN").write_text(rows)

    def pin_sdist(self, extra: list[tarfile.TarInfo] | None = None) -> Path:
        sdist = make_sdist(self.root / f"{TOP}.tar.gz", extra)
        self.write_pin(hashlib.sha256(sdist.read_bytes()).hexdigest())
        return sdist

    def run(self, *words: str | Path, tool: str = "fetch_upstream.py") -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [sys.executable, TOOLS / tool, *words]
        command += ["--pin", self.root / "PIN", "--patches", self.root / "patches", "--cache", self.root / "cache"]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)

    def fail(self, *words: str | Path, tool: str = "fetch_upstream.py") -> str:
        """The one line of a run that must fail."""
        done = self.run(*words, tool=tool)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1, done
        assert done.stdout == ""
        assert len(lines) == 1, done.stderr
        assert ": expected " in lines[0]
        assert "; " in lines[0], "no cure in the message"
        return lines[0]

    def snapshot(self, folder: Path) -> dict[str, tuple[int, str]]:
        paths = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_text()) for path in paths}


def hostile(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size
    return member
