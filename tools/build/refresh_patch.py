#!/usr/bin/env python3
"""Edit the upstream patches as commits, and write them back in a stable form.

    python tools/build/refresh_patch.py edit WORK      # WORK: a throw-away git repository, one commit for each patch
    cd WORK; edit; git commit --amend            # or rebase -i; a new commit "003-name.patch" is a new patch
    python tools/build/refresh_patch.py write WORK     # regenerate native/upstream/*.patch from the commits

A commit's subject is the patch's file name and its body the header text above the diff. After the pin moved, `edit`
stops at the first patch that does not apply and leaves *.rej files: fix, delete them, commit as the message says,
and run `edit WORK` again for the rest. Patches hold no index lines, so blob hashes make no noise in reviews.
Standard library and git only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import fetch_upstream as fetch
from upstream_patches import PATCH_NAME, Patch, UpstreamError, git_env, read_patch, read_patches, tree_digests

BASE = "pristine"  # the tag of the commit below the first patch
DIFF = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "-U3", "--diff-algorithm=myers"]


def note(text: str) -> None:
    print(f"refresh_patch: {text}", file=sys.stderr, flush=True)


def git(work: Path, *words: str, check: bool = True) -> str:
    """stdout of `git -C work words`; git's first complaint becomes our one line."""
    try:
        done = subprocess.run(["git", *words], cwd=work, env=git_env(work), capture_output=True, check=False)
    except FileNotFoundError as err:
        raise UpstreamError("git on PATH", "none", "install it, e.g. apt-get install git") from err
    if check and done.returncode != 0:
        said = (done.stderr + done.stdout).decode("utf-8", "replace").strip().splitlines()
        raise UpstreamError(
            f"git {words[0]} to work in {work}", f"'{said[0] if said else done.returncode}'", "see WORK"
        )
    return done.stdout.decode("utf-8")


def commit(work: Path, name: str, header: str) -> None:
    git(work, "add", "--all", "--force")
    message = f"{name}\n\n{header.strip()}".strip() + "\n"
    git(work, "commit", "--quiet", "--allow-empty", "--cleanup=verbatim", "-m", message)


def create(work: Path, source: Path) -> None:
    """A new repository in `work` whose only commit, tagged BASE, is what the build uses of the pristine sources."""
    if work.exists() and any(work.iterdir()):
        raise UpstreamError(f"an empty or new folder at {work}", "something else there", "choose another")
    for name in tree_digests(source, fetch.BUILD):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes((source / name).read_bytes())
    git(work, "init", "--quiet")
    for key, value in {"user.name": "qap_gguf", "user.email": "qap", "commit.gpgsign": "false"}.items():
        git(work, "config", key, value)
    git(work, "config", "core.autocrlf", "false")
    commit(work, BASE, "The pinned upstream sources, as far as the build needs them.")
    git(work, "tag", BASE)


def commits(work: Path) -> list[tuple[str, str, str]]:
    """(hash, subject, body) of each commit above BASE, oldest first."""
    hashes = git(work, "rev-list", "--reverse", f"{BASE}..HEAD").split()
    return [
        (h, git(work, "log", "-1", "--format=%s", h).strip(), git(work, "log", "-1", "--format=%b", h)) for h in hashes
    ]


def check_clean(work: Path) -> None:
    if dirty := git(work, "status", "--porcelain").splitlines():
        cure = "commit it (git commit --amend) and delete *.rej files"
        raise UpstreamError(f"no uncommitted change in {work}", f"'{dirty[0].strip()}'", cure)


def edit(work: Path, source: Path, patches: list[Patch]) -> None:
    """Create `work` where needed and commit the patches that it does not hold yet."""
    if not (work / ".git").is_dir():
        create(work, source)
    check_clean(work)
    done = {subject for _, subject, _ in commits(work)}
    for patch in (patch for patch in patches if patch.name not in done):
        words = ["apply", "--whitespace=nowarn", str(patch.path.resolve())]
        try:
            git(work, *words)
        except UpstreamError as err:
            git(work, *words[:1], "--reject", *words[1:], check=False)
            message = work / ".git" / "QAP_MESSAGE"
            message.write_text(f"{patch.name}\n\n{patch.header.strip()}\n", encoding="utf-8")
            cure = f"fix *.rej in {work}, delete them, git add -A, git commit -F .git/QAP_MESSAGE, then edit again"
            raise UpstreamError(f"{patch.name} to apply to the pin", "rejected hunks", cure) from err
        commit(work, patch.name, patch.header)
    note(f"{len(patches)} patch(es) as commits in {work}; amend them, then: refresh_patch.py write {work}")


def render(work: Path, commit_hash: str, body: str) -> str:
    """The text of a patch file: header, an empty line, and the diff without index lines."""
    diff = git(work, "diff", *DIFF, "--src-prefix=a/", "--dst-prefix=b/", f"{commit_hash}^", commit_hash)
    diff = re.sub(r"^index [0-9a-f]+\.\.[0-9a-f]+(?: [0-7]+)?\n", "", diff, flags=re.MULTILINE)
    header = body.strip()
    return f"{header}\n\n{diff}" if header else diff


def write(work: Path, folder: Path) -> None:
    """Write one patch file for each commit above BASE; files that are already right are left alone."""
    if not (work / ".git").is_dir():
        raise UpstreamError(f"a work folder made by `edit` at {work}", "none", "run refresh_patch.py edit first")
    check_clean(work)
    rows = commits(work)
    names = [subject for _, subject, _ in rows]
    for name in names:
        if not PATCH_NAME.fullmatch(name) or names.count(name) > 1:
            cure = "reword or squash with git rebase -i pristine"
            raise UpstreamError("one commit for each patch, named like 001-hooks.patch", f"'{name}'", cure)
    if names != sorted(names):
        raise UpstreamError("commits in the order of their numbers", ", ".join(names), "git rebase -i pristine")
    if stale := {path.name for path in folder.glob("*.patch")} - set(names):
        cure = f"delete the file in {folder} if the patch is gone, or run edit again"
        raise UpstreamError("a commit for each patch file", f"none for {min(stale)}", cure)
    for commit_hash, name, body in rows:
        text = render(work, commit_hash, body)
        final = folder / name
        with tempfile.TemporaryDirectory(prefix=".write-", dir=folder) as part_folder:
            part = Path(part_folder) / name
            part.write_text(text, encoding="utf-8")
            patch = read_patch(part)  # an empty commit is an error here
            changed = not final.is_file() or final.read_text(encoding="utf-8") != text
            if changed:
                os.replace(part, final)
        note(f"{patch.counts()}: {'written' if changed else 'unchanged'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Edit the upstream patches as commits and write them back.")
    parser.add_argument("action", choices=["edit", "write"])
    parser.add_argument("work", type=Path, help="the throw-away work folder")
    parser.add_argument("--patches", type=Path, default=fetch.ROOT / "native/upstream", help="folder of patches")
    parser.add_argument("--pin", type=Path, default=fetch.ROOT / "native/upstream/PIN", help="pin file")
    parser.add_argument("--cache", help="cache folder of fetch_upstream")
    parser.add_argument("--sdist", help="the pinned .tar.gz instead of pip")
    parser.add_argument("--upstream-dir", help="an unpacked sdist or llama.cpp tree instead of pip")
    args = parser.parse_args(argv)
    work: Path = args.work.absolute()
    try:
        if args.action == "edit":
            edit(work, fetch.find_source(args, fetch.read_pin(args.pin)), read_patches(args.patches))
        else:
            write(work, args.patches)
    except UpstreamError as err:
        note(str(err))
        return 1
    except OSError as err:
        note(f"expected to read and write files, got {err!r}; free space or fix access")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
