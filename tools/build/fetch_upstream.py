#!/usr/bin/env python3
"""Bring the pinned upstream sources (native/upstream/PIN), and lay out a patched tree for the build.

    python tools/build/fetch_upstream.py                       # unpack what is needed into the cache, print its path
    python tools/build/fetch_upstream.py --apply build/up  # the same, then a patched copy in build/up (CMake does this)
    python tools/build/fetch_upstream.py --verify              # do the patches still apply? (make lint does this)

The sources come from, first match wins: --upstream-dir DIR, --sdist FILE, $QAP_UPSTREAM_DIR, $QAP_UPSTREAM_SDIST,
the cache ($QAP_CACHE, else ~/.cache/qap_gguf), and last the package index by `pip download`. pip checks the sha256
before it runs anything of the archive. The last line on stdout is the path of the tree; notes go to stderr; a
failure is one line and exit 1. Standard library only: it runs before anything of ours is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from upstream_patches import STAMP, Patch, UpstreamError, apply_tree, file_digest, read_patches, tree_digests

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Paths below vendor/llama.cpp of the sdist. BUILD is copied for the compiler; `#include "../src/llama-ext.h"` in
# mtmd-helper-gen.cpp resolves against -I <tree>/vendor. CONVERTER is installed as it is, for the families of models
# that llama.cpp's own converter knows. CHAT are the headers of libllama-common. REFERENCE is for tests: which backend
# has which operation, and chat templates as they were published.
_GGUF = ("__init__", "constants", "gguf", "gguf_reader", "gguf_writer", "lazy", "metadata", "quants", "tensor_mapping")
CONVERTER = (
    *("convert_hf_to_gguf.py", "conversion/", "gguf-py/LICENSE"),
    *(f"gguf-py/gguf/{name}.py" for name in (*_GGUF, "utility", "vocab")),
)
_JINJA = ("caps", "lexer", "parser", "runtime", "string", "utils", "value")
CHAT = tuple(f"common/{name}.h" for name in ("chat", "common", "json", "json-schema", "json-schema-to-grammar", "log"))
BUILD = (
    *(*CHAT, "common/peg-parser.h", *(f"common/jinja/{name}.h" for name in _JINJA)),
    *("LICENSE", "src/llama-ext.h", "tools/mtmd/", "vendor/CMakeLists.txt", "vendor/hash/", "vendor/miniaudio/"),
    *("vendor/nlohmann/", "vendor/sheredom/", "vendor/stb/", "vendor/cpp-httplib/"),
    *("common/", "tools/server/"),
    *CONVERTER,
)
REFERENCE = (
    *("docs/ops.md", *(f"docs/ops/{name}.csv" for name in ("CPU", "CUDA", "Metal", "Vulkan"))),
    "models/templates/",
)
REQUIRED = (
    *("LICENSE", "src/llama-ext.h", "tools/mtmd/clip.cpp", "tools/mtmd/mtmd.cpp", "vendor/stb/stb_image.h"),
    *("convert_hf_to_gguf.py", "conversion/__init__.py", "gguf-py/gguf/__init__.py", "common/chat.h"),
)
MAX_UNPACKED = 256 << 20  # bytes; the real selection is 20 MB

HOOKS, HOOKS_MAX_ADDED = "001-hooks.patch", 40  # the call-site patch only adds, and stays small


@dataclass(frozen=True)
class Pin:
    """What native/upstream/PIN says."""

    package: str
    version: str
    commit: str
    sha256: str

    @property
    def key(self) -> str:
        """Names the pin and the selection, so that a cache made for others is not reused."""
        parts = (self.package, self.version, self.commit, self.sha256, *BUILD, *REFERENCE)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def note(text: str) -> None:
    print(f"fetch_upstream: {text}", file=sys.stderr, flush=True)


def read_pin(path: Path) -> Pin:
    """Parse `key = value` lines; each of the four keys exactly once, nothing else."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise UpstreamError(f"the pin file {path}", err.strerror or "an error", "restore it or pass --pin") from err
    rows = [line.partition("=") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    keys = [key.strip() for key, _, _ in rows]
    if sorted(keys) != ["commit", "package", "sha256", "version"]:
        cure = "give each exactly once"
        raise UpstreamError(f"the keys package, version, commit, sha256 in {path}", f"{keys}", cure)
    pin = Pin(**{key.strip(): value.strip() for key, _, value in rows})
    if not re.fullmatch("[0-9a-f]{64}", pin.sha256):
        raise UpstreamError(f"64 hex digits as sha256 in {path}", f"'{pin.sha256}'", "run sha256sum on the sdist")
    return pin


def check_hash(sdist: Path, pin: Pin) -> None:
    if not sdist.is_file():
        raise UpstreamError(f"the sdist of {pin.package} {pin.version}", f"no file at {sdist}", "check the path")
    if (got := file_digest(sdist)) != pin.sha256:
        cure = f"use the .tar.gz of {pin.package} {pin.version}, or move the pin (CONTRIBUTING.md)"
        raise UpstreamError(f"sha256 {pin.sha256}", f"{got} for {sdist}", cure)


def pip_commands() -> Iterator[tuple[list[str], dict[str, str]]]:
    """Ways to call pip, best first. Under pip's build isolation our interpreter sees no pip until PYTHONPATH goes."""
    env = {key: value for key, value in os.environ.items() if key not in ("PIP_BUILD_TRACKER", "PIP_REQUIRE_HASHES")}
    bare = {key: value for key, value in env.items() if not key.startswith("PYTHON")}
    yield [sys.executable, "-m", "pip"], env
    yield [sys.executable, "-m", "pip"], bare
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            yield [found], bare
    for name in ("python3", "python"):
        if found := shutil.which(name):
            yield [found, "-m", "pip"], bare
    with tempfile.TemporaryDirectory(prefix="qap-pip-") as folder:  # an environment made by uv has no pip at all
        made = subprocess.run([sys.executable, "-m", "venv", folder], env=bare, capture_output=True, check=False)
        if made.returncode == 0:
            yield [str(Path(folder) / "bin" / "python"), "-m", "pip"], bare


def find_pip() -> tuple[list[str], dict[str, str]]:
    """The first of `pip_commands` that answers `--version`."""
    for command, env in pip_commands():
        try:
            probe = subprocess.run([*command, "--version"], env=env, capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if probe.returncode == 0:
            return command, env
    cure = "install it (python -m ensurepip), or pass --sdist FILE or --upstream-dir DIR"
    raise UpstreamError("a pip to download with", f"none in {sys.executable} nor on PATH", cure)


def download(pin: Pin, folder: Path) -> Path:
    """`pip download` the sdist into `folder`. Told the hash, pip refuses a wrong archive before it runs its build."""
    command, env = find_pip()
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    note(f"downloading {pin.package} {pin.version} with {' '.join(command)} (about 80 MB) ...")
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--retries", "2"]
    options += ["--no-deps", "--no-binary", pin.package, "--require-hashes", "-r", str(wanted), "-d", str(folder)]
    done = subprocess.run([*command, "download", *options], env=env, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*.tar.gz"))
    if done.returncode == 0 and len(files) == 1:
        return files[0]
    said = done.stdout + done.stderr
    if found := re.search(r"^\s*Got\s+([0-9a-f]{64})", said, re.MULTILINE):
        cure = "the archive is not the pinned one: do not use it, check the index that pip reads"
        raise UpstreamError(f"sha256 {pin.sha256} for {pin.package} {pin.version}", found[1], cure)
    errors = [line.strip() for line in said.splitlines() if line.startswith("ERROR:")] or said.strip().splitlines()
    got = errors[-1][:300] if errors else f"exit {done.returncode}"
    cure = "check the network, or pass --sdist FILE, or set QAP_UPSTREAM_DIR to an unpacked sdist"
    raise UpstreamError(f"pip to download {pin.package} {pin.version}", f"'{got}'", cure)


def unpack(sdist: Path, dest: Path, pin: Pin) -> None:
    """Write the selected regular files of the sdist below `dest`; a hostile name or link refuses the whole archive."""
    commit = ""
    left = MAX_UNPACKED
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.name.startswith("/") or ".." in parts or "\\" in member.name:
                raise UpstreamError("relative paths in the sdist", repr(member.name), "do not use this archive")
            inner = "/".join(parts[1:])
            name = inner.removeprefix("vendor/llama.cpp/")
            is_head = inner == ".git/modules/vendor/llama.cpp/HEAD"
            if member.isdir() or not (is_head or (name != inner and name.startswith(BUILD + REFERENCE))):
                continue
            stream = archive.extractfile(member) if member.isreg() else None
            left -= member.size
            if stream is None or left < 0:
                got = f"{member.name!r}, " + ("a link or device" if stream is None else "too large")
                raise UpstreamError("plain source files in the sdist", got, "do not use this archive")
            with stream:
                if is_head:
                    commit = stream.read(100).decode("ascii", "replace").strip()
                    continue
                target = dest / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)
    check_tree(dest, pin, commit, str(sdist))


def check_tree(root: Path, pin: Pin, commit: str, where: str) -> None:
    """The files that the build cannot do without are there, and the commit, where it can be read, is the pinned one."""
    if missing := [name for name in REQUIRED if not (root / name).is_file()]:
        raise UpstreamError(f"{missing[0]} in {where}", "no such file", "give an sdist or a llama.cpp tree at the pin")
    if re.fullmatch("[0-9a-f]{40}", commit) and not commit.startswith(pin.commit):
        raise UpstreamError(f"llama.cpp commit {pin.commit} in {where}", commit, "check out the pinned commit")


def use_directory(folder: Path, pin: Pin) -> Path:
    """The llama.cpp root inside an unpacked sdist or a llama.cpp tree, versions checked as far as it tells them."""
    sdist_root = folder / "vendor" / "llama.cpp"
    root = sdist_root if sdist_root.is_dir() else folder
    init = folder / "llama_cpp" / "__init__.py"
    if root is sdist_root and init.is_file():
        found = re.search(r"^__version__ = [\"']([^\"']+)", init.read_text(encoding="utf-8"), re.MULTILINE)
        if found and found[1] != pin.version:
            raise UpstreamError(f"{pin.package} {pin.version} in {folder}", found[1], "unpack the pinned sdist")
    for head in (folder / ".git/modules/vendor/llama.cpp/HEAD", root / ".git/HEAD"):
        if head.is_file():
            commit = head.read_text(encoding="ascii", errors="replace").strip()
            if commit.startswith("ref: "):
                ref = head.parent / commit[5:]
                commit = ref.read_text(encoding="ascii").strip() if ref.is_file() else ""
            check_tree(root, pin, commit, str(folder))
            break
    else:
        check_tree(root, pin, "", str(folder))
    return root


def cache_is_good(folder: Path, pin: Pin) -> bool:
    try:
        mark = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(mark == {"key": pin.key, "files": tree_digests(folder, BUILD + REFERENCE)})


def fill_cache(pin: Pin, cache: Path, sdist: Path | None) -> Path:
    """The finished cache folder; made in a temporary folder beside it and renamed, so that it is whole or absent."""
    if sdist is not None:
        check_hash(sdist, pin)
    final = cache / f"upstream-{pin.version}-{pin.sha256[:8]}"
    if cache_is_good(final, pin):
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    except OSError as err:
        raise UpstreamError(f"a writable cache folder {cache}", f"'{err.strerror}'", "set QAP_CACHE") from err
    try:
        if sdist is None:
            sdist = download(pin, work)
            check_hash(sdist, pin)
        tree = work / "tree"
        unpack(sdist, tree, pin)
        mark = {"key": pin.key, "files": tree_digests(tree, BUILD + REFERENCE)}
        (tree / STAMP).write_text(json.dumps(mark), encoding="utf-8")
        if final.exists():  # another selection, or damaged
            final.rename(work / "old")
        try:
            tree.rename(final)
        except OSError:
            if not cache_is_good(final, pin):  # not just another process that was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def find_source(args: argparse.Namespace, pin: Pin) -> Path:
    """The pristine llama.cpp root, from where the user or the environment says."""
    folder, sdist = args.upstream_dir, args.sdist
    if not folder and not sdist:
        folder, sdist = os.environ.get("QAP_UPSTREAM_DIR"), os.environ.get("QAP_UPSTREAM_SDIST")
    if folder:
        if not Path(folder).is_dir():
            cure = "give an unpacked sdist or a llama.cpp tree"
            raise UpstreamError("an upstream folder", f"no folder at {folder}", cure)
        return use_directory(Path(folder).resolve(), pin)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qap_gguf"
    cache = Path(args.cache or os.environ.get("QAP_CACHE") or home).expanduser().absolute()
    return fill_cache(pin, cache, Path(sdist) if sdist else None)


def verify(source: Path, patches: list[Patch]) -> None:
    """Patches apply to pristine sources, a second run changes nothing, and the hooks only add. Prints the counts."""
    hooks = [patch for patch in patches if patch.name == HOOKS]
    if not hooks:
        raise UpstreamError(f"{HOOKS} among the patches", f"{[patch.name for patch in patches]}", "pass --patches")
    if hooks[0].removed or hooks[0].added > HOOKS_MAX_ADDED:
        cure = "move code to native/src and leave calls only"
        raise UpstreamError(f"{HOOKS} with 0 removed and at most {HOOKS_MAX_ADDED} added", hooks[0].counts(), cure)
    with tempfile.TemporaryDirectory(prefix="qap-verify-") as folder:
        dest = Path(folder) / "tree"
        apply_tree(source, BUILD, patches, dest)
        before = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
        again = apply_tree(source, BUILD, patches, dest)
        if again or before != {path: path.stat().st_mtime_ns for path in dest.rglob("*")}:
            raise UpstreamError("a second --apply to change nothing", "changed files", "report this as a bug")
    for patch in patches:
        print(patch.counts())
    print(f"{len(patches)} patch(es) apply to the pinned sources; applying twice changes nothing")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bring and patch the pinned upstream sources.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--upstream-dir", metavar="DIR", help="an unpacked sdist or llama.cpp tree instead of pip")
    source.add_argument("--sdist", metavar="FILE", help="the pinned .tar.gz instead of pip")
    parser.add_argument("--pin", type=Path, default=ROOT / "native/upstream/PIN", help="pin file")
    parser.add_argument("--patches", type=Path, default=ROOT / "native/upstream", help="folder of patches")
    parser.add_argument("--cache", help="cache folder (default: $QAP_CACHE or ~/.cache/qap_gguf)")
    parser.add_argument("--apply", metavar="DEST", type=Path, help="write the patched tree there")
    parser.add_argument("--verify", action="store_true", help="check the patches and print their counts")
    args = parser.parse_args(argv)
    try:
        pin = read_pin(args.pin)
        patches = read_patches(args.patches) if args.verify or args.apply else []
        tree = find_source(args, pin)
        if args.verify:
            verify(tree, patches)
        if args.apply:
            changed = apply_tree(tree, BUILD, patches, args.apply)
            note(f"{len(patches)} patch(es) in {args.apply}: {'written' if changed else 'unchanged'}")
            tree = args.apply.absolute()
    except UpstreamError as err:
        note(str(err))
        return 1
    except (OSError, tarfile.TarError, EOFError, UnicodeDecodeError) as err:
        note(" ".join(f"expected readable sources and a writable disk, got {err!r}; free space or fix access".split()))
        return 1
    except KeyboardInterrupt:
        note("interrupted; nothing half-written was left under its final name")
        return 130
    print(tree)
    return 0


if __name__ == "__main__":
    sys.exit(main())
