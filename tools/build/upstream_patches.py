"""Read, count and apply the patches in native/upstream with git or patch(1), and lay out the patched tree.

Used by fetch_upstream.py and refresh_patch.py. Standard library only: it runs at CMake configure time, before
anything of ours is installed. A patch is a plain unified diff relative to the llama.cpp root; the text above its
first diff line is its header and says why the patch exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PATCH_NAME = re.compile(r"[0-9]{3}-[a-z0-9][a-z0-9-]*\.patch")
STAMP = ".qap-upstream.json"  # in each tree that we write: what was written, and from what
_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


class UpstreamError(Exception):
    """One line for the user: what was expected, what came, what to do."""

    def __init__(self, expected: str, got: str, cure: str) -> None:
        super().__init__(" ".join(f"expected {expected}, got {got}; {cure}".split()))


@dataclass(frozen=True)
class Patch:
    """One patch file: `header` stands above the first diff line, `diff` is the rest, `files` are paths it changes."""

    path: Path
    header: str
    diff: str
    files: tuple[str, ...]
    added: int
    removed: int

    @property
    def name(self) -> str:
        return self.path.name

    def counts(self) -> str:
        return f"{self.name}: {self.added} added, {self.removed} removed, {len(self.files)} file(s)"


def split_header(text: str) -> tuple[str, str]:
    """(header, diff) of a patch: the diff begins at the first `diff --git` or `--- ` line.

    >>> split_header("why\\n--- a/x\\n+++ b/x\\n")
    ('why\\n', '--- a/x\\n+++ b/x\\n')
    """
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.startswith(("diff --git ", "--- ")):
            return "".join(lines[:number]), "".join(lines[number:])
    return text, ""


def read_patch(path: Path) -> Patch:
    """Parse one patch file. Hunk lengths are followed, so a content line that starts with `+++` is counted rightly."""
    header, diff = split_header(path.read_text(encoding="utf-8"))
    files: list[str] = []
    added = removed = old_left = new_left = 0
    old_file = ""
    for line in diff.splitlines():
        if old_left > 0 or new_left > 0:
            if line.startswith("+"):
                added, new_left = added + 1, new_left - 1
            elif line.startswith("-"):
                removed, old_left = removed + 1, old_left - 1
            elif not line.startswith("\\"):  # "\ No newline at end of file" belongs to no side
                old_left, new_left = old_left - 1, new_left - 1
        elif hunk := _HUNK.match(line):
            old_left, new_left = (int(n) if n is not None else 1 for n in hunk.groups())
        elif line.startswith("--- "):
            old_file = line[4:].split("\t")[0].strip()
        elif line.startswith("+++ "):
            new_file = line[4:].split("\t")[0].strip()
            files.append((old_file if new_file == "/dev/null" else new_file).partition("/")[2])
    if not files or old_left > 0 or new_left > 0:
        got = "no diff" if not files else "a last hunk that is cut off"
        raise UpstreamError(f"a unified diff in {path}", got, "regenerate it with tools/build/refresh_patch.py")
    return Patch(path, header, diff, tuple(files), added, removed)


def read_patches(folder: Path) -> list[Patch]:
    """All patches of a folder in the order of their numbers. A stray *.patch name is an error, not a skipped file."""
    if not folder.is_dir():
        raise UpstreamError("a folder of patches", f"no folder at {folder}", "give the right one with --patches")
    paths = sorted(folder.glob("*.patch"))
    for path in paths:
        if not PATCH_NAME.fullmatch(path.name):
            raise UpstreamError("a patch name like 001-hooks.patch", path.name, f"rename it in {folder}")
    return [read_patch(path) for path in paths]


def git_env(folder: Path) -> dict[str, str]:
    """An environment in which git sees neither the user's settings nor a repository above `folder`.

    Without the ceiling, `git apply` inside an ignored folder of a repository skips every file and reports success.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)
    env["GIT_CONFIG_NOSYSTEM"] = "1"
    env["GIT_CONFIG_GLOBAL"] = os.devnull
    return env


def patch_tool() -> str:
    """`git` or `patch`, whichever this machine has first."""
    for name in ("git", "patch"):
        if shutil.which(name):
            return name
    raise UpstreamError("git or patch on PATH", "neither", "install one, e.g. apt-get install git")


def _run_tool(tree: Path, patch: Path, tool: str, *, reverse_check: bool) -> subprocess.CompletedProcess[str]:
    if tool == "git":
        command = ["git", "apply", "--whitespace=nowarn"]
        command += ["--reverse", "--check"] if reverse_check else []
        command += [str(patch.resolve())]
    else:
        command = ["patch", "-p1", "-F0", "-t", "-s"]
        command += ["-R", "-f", "--dry-run"] if reverse_check else ["-N"]
        command += ["-i", str(patch.resolve())]
    env = git_env(tree)
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def apply_patch(tree: Path, patch: Patch, tool: str) -> None:
    """Apply one patch inside `tree` and prove it: each file that it names changed, and it would reverse cleanly."""
    before = {name: file_digest(tree / name) for name in patch.files}
    done = _run_tool(tree, patch.path, tool, reverse_check=False)
    unchanged = [name for name in patch.files if file_digest(tree / name) == before[name]]
    if done.returncode == 0 and not unchanged:
        if tool == "patch":  # patch(1) keeps a copy of a file whose hunks moved
            for name in patch.files:
                (tree / f"{name}.orig").unlink(missing_ok=True)
        if _run_tool(tree, patch.path, tool, reverse_check=True).returncode == 0:
            return
    lines = (done.stderr + done.stdout).strip().splitlines()
    got = lines[0] if lines else f"no change in {', '.join(unchanged) or 'a file it names'}"
    cure = "the pin moved or the sources are not pristine: regenerate the patches with tools/build/refresh_patch.py"
    raise UpstreamError(f"{patch.name} to apply ({tool})", f"'{got}'", f"{cure} (see CONTRIBUTING.md)")


def file_digest(path: Path) -> str:
    """sha256 of a file as hex, or "" where there is none."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree_digests(root: Path, select: tuple[str, ...]) -> dict[str, str]:
    """{relative path: sha256} of the regular files below `root` that begin with one of `select`, sorted by path."""
    names: set[str] = set()
    for prefix in select:
        top = root / prefix
        paths = top.rglob("*") if top.is_dir() else [top]
        names.update(p.relative_to(root).as_posix() for p in paths if p.is_file() and not p.is_symlink())
    return {name: file_digest(root / name) for name in sorted(names)}


def read_stamp(dest: Path) -> dict[str, str] | None:
    """{file: sha256} that this tool wrote into `dest`, plus "" -> key of the inputs; None for a new or empty folder."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return None
    try:
        stamp = json.loads((dest / STAMP).read_text(encoding="utf-8"))
        return {"": str(stamp[""]), **{str(name): str(value) for name, value in stamp.items()}}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as err:
        cure = "give another --apply folder, or delete this one"
        raise UpstreamError(f"an empty folder or one made by this tool at {dest}", "something else", cure) from err


def apply_tree(source: Path, select: tuple[str, ...], patches: list[Patch], dest: Path) -> bool:
    """Make `dest` the patched copy of what `select` (path prefixes) names in `source`.

    True when files were written, False when all was as it should be.
    Files that are already right keep their time stamp, so ninja compiles only what a changed patch touches.
    """
    wanted = tree_digests(source, select)
    own = [file_digest(Path(__file__).with_name(name)) for name in ("fetch_upstream.py", "upstream_patches.py")]
    inputs = json.dumps([wanted, [(patch.name, file_digest(patch.path)) for patch in patches], own])
    key = hashlib.sha256(inputs.encode()).hexdigest()
    stamp = read_stamp(dest)
    have = {name: file_digest(dest / name) for name in stamp or {} if name}
    if stamp and stamp[""]:  # an empty key: the last run was cut off, its half-written files may go
        for name, value in have.items():
            if value not in ("", stamp[name]):
                cure = f"keep it with tools/build/refresh_patch.py (CONTRIBUTING.md), then delete {dest}"
                raise UpstreamError(f"{dest / name} as it was written", "an edited file", cure)
        if stamp[""] == key and all(have.values()):
            return False
    tool = patch_tool() if patches else ""
    with tempfile.TemporaryDirectory(prefix="qap-upstream-") as folder:
        tree = Path(folder).resolve() / "tree"
        for name in wanted:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, tree / name)
        for patch in patches:
            apply_patch(tree, patch, tool)
        result = tree_digests(tree, ("",))
        dest.mkdir(parents=True, exist_ok=True)
        write_stamp(dest, {**have, **result, "": ""})
        for name, value in result.items():
            if file_digest(dest / name) != value:
                (dest / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tree / name, dest / name)
        for name in have.keys() - result.keys():
            (dest / name).unlink(missing_ok=True)
    write_stamp(dest, {**result, "": key})
    return True


def write_stamp(dest: Path, stamp: dict[str, str]) -> None:
    part = dest / f"{STAMP}.part"
    part.write_text(json.dumps(stamp, sort_keys=True), encoding="utf-8")
    part.replace(dest / STAMP)
