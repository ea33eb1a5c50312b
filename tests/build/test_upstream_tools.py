"""tools/build/fetch_upstream.py and tools/build/refresh_patch.py on a small fake sdist: no network, no compiler.

Commands run as subprocesses, as CMake runs them, so that exit codes and the one-line messages are what is tested.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

import upstream_patches
from fake_upstream import CLIP, COMMIT, ENCODER, FILES, HOOKS, TOP, Place, hostile, sdist_files


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "001-hooks.patch").write_text(HOOKS)
    (tmp_path / "patches" / "002-encoder.patch").write_text(ENCODER)
    env = {key: value for key, value in os.environ.items() if not key.startswith("QAP_")}
    return Place(tmp_path, env)


def test_unpacks_only_what_is_needed_and_prints_the_folder_last(place: Place) -> None:
    done = place.run("--sdist", place.pin_sdist())
    assert done.returncode == 0, done.stderr
    tree = Path(done.stdout.splitlines()[-1])
    found = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert found == {*FILES, ".qap-upstream.json"} - {"src/unwanted.cpp"}


def test_a_finished_cache_needs_neither_network_nor_sdist(place: Place) -> None:
    sdist = place.pin_sdist()
    place.run("--sdist", sdist)
    sdist.unlink()
    place.env["PATH"] = str(place.root)  # no pip, no git: nothing may be called
    assert place.run().returncode == 0


def test_a_damaged_cache_is_made_anew(place: Place) -> None:
    sdist = place.pin_sdist()
    tree = Path(place.run("--sdist", sdist).stdout.splitlines()[-1])
    (tree / "LICENSE").write_text("damaged")
    place.env["QAP_UPSTREAM_SDIST"] = str(sdist)
    assert place.run().returncode == 0
    assert (tree / "LICENSE").read_text() == FILES["LICENSE"]
    assert [path.name for path in (place.root / "cache").iterdir()] == [tree.name]  # no leftovers


def test_wrong_hash_names_both_hashes(place: Place) -> None:
    sdist = place.pin_sdist()
    real = hashlib.sha256(sdist.read_bytes()).hexdigest()
    place.write_pin("f" * 64)
    line = place.fail("--sdist", sdist)
    assert "f" * 64 in line
    assert real in line
    assert not (place.root / "cache").exists()


@pytest.mark.parametrize(
    ("pin", "word"),
    [
        ("package = a\nversion = 1\ncommit = 2\n", "sha256"),
        ("package = a\nversion = 1\ncommit = 2\nsha256 = xyz\n", "64 hex digits"),
        ("package = a\npackage = a\nversion = 1\ncommit = 2\nsha256 = 3\n", "exactly once"),
    ],
)
def test_bad_pin(place: Place, pin: str, word: str) -> None:
    (place.root / "PIN").write_text(pin)
    assert word in place.fail()


def test_another_commit_in_the_sdist_is_refused(place: Place) -> None:
    sdist = place.pin_sdist()
    place.write_pin(hashlib.sha256(sdist.read_bytes()).hexdigest(), commit="f" * 40)
    assert COMMIT in place.fail("--sdist", sdist)


@pytest.mark.parametrize(
    "member",
    [
        hostile(f"{TOP}/../../outside.txt"),
        hostile("/absolute.txt"),
        hostile(f"{TOP}/vendor/llama.cpp/tools/mtmd/..\\win.txt"),
        hostile(f"{TOP}/vendor/llama.cpp/tools/mtmd/link.h", tarfile.SYMTYPE, "/etc/passwd"),
        hostile(f"{TOP}/vendor/llama.cpp/tools/mtmd/hard.h", tarfile.LNKTYPE, f"{TOP}/LICENSE"),
        hostile(f"{TOP}/vendor/llama.cpp/tools/mtmd/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: member.name.rsplit("/", 1)[-1],
)
def test_hostile_members_refuse_the_archive(place: Place, member: tarfile.TarInfo) -> None:
    assert "do not use this archive" in place.fail("--sdist", place.pin_sdist([member]))
    assert list((place.root / "cache").iterdir()) == []
    assert not (place.root.parent / "outside.txt").exists()


def test_a_cut_off_archive_is_one_line(place: Place) -> None:
    sdist = place.pin_sdist()
    sdist.write_bytes(sdist.read_bytes()[:200])
    place.write_pin(hashlib.sha256(sdist.read_bytes()).hexdigest())
    place.fail("--sdist", sdist)
    assert list((place.root / "cache").iterdir()) == []


def test_no_pip_and_no_network_say_what_to_pass(place: Place) -> None:
    place.pin_sdist()
    place.env.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(place.root / "patches"))
    done = place.run()
    assert done.returncode == 1
    assert "QAP_UPSTREAM_DIR" in done.stderr.splitlines()[-1]
    assert list((place.root / "cache").iterdir()) == []


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_apply_is_idempotent_and_touches_only_what_changed(place: Place, tool: str) -> None:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"no {tool} here")
    (place.root / "bin").mkdir()
    (place.root / "bin" / tool).symlink_to(found)
    place.env["PATH"] = str(place.root / "bin")
    dest = place.root / "build" / "tree"
    words = ("--sdist", place.pin_sdist(), "--apply", dest)
    done = place.run(*words)
    assert (done.returncode, done.stdout) == (0, f"{dest}\n"), done.stderr
    first = place.snapshot(dest)
    assert first["tools/mtmd/clip.cpp"][1] == CLIP.replace("line 3\n", "hook();\n++counter;\nline 3\n")
    assert first["tools/mtmd/mtmd.cpp"][1] == "int mended;\n"
    assert "docs/ops/CPU.csv" not in first

    assert "unchanged" in place.run(*words).stderr
    assert place.snapshot(dest) == first

    (place.root / "patches" / "002-encoder.patch").write_text(ENCODER.replace("mended", "mended_again"))
    assert "written" in place.run(*words).stderr
    second = place.snapshot(dest)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"tools/mtmd/mtmd.cpp", ".qap-upstream.json"}
    assert second.keys() == first.keys()


def test_apply_works_inside_an_ignored_folder_of_a_repository(place: Place) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    subprocess.run(["git", "init", "-q", place.root], check=True)
    (place.root / ".gitignore").write_text("build/\n")
    place.env["GIT_DIR"] = str(place.root / ".git")
    place.env["TMPDIR"] = str(place.root / "build")  # the tool works in a temporary folder: let it be ignored as well
    (place.root / "build").mkdir()
    dest = place.root / "build" / "tree"
    assert place.run("--sdist", place.pin_sdist(), "--apply", dest).returncode == 0
    assert "hook();" in (dest / "tools/mtmd/clip.cpp").read_text()


def test_no_patch_tool_at_all(place: Place) -> None:
    words = ("--sdist", place.pin_sdist(), "--apply", place.root / "build")
    place.env["PATH"] = str(place.root)
    assert "expected git or patch on PATH, got neither" in place.fail(*words)
    assert not (place.root / "build").exists()


def test_a_patch_that_does_not_apply_leaves_no_tree(place: Place) -> None:
    (place.root / "patches" / "001-hooks.patch").write_text(HOOKS.replace(" line 3", " line three"))
    line = place.fail("--sdist", place.pin_sdist(), "--apply", place.root / "build")
    assert "001-hooks.patch" in line
    assert "refresh_patch.py" in line
    assert not (place.root / "build").exists()


def test_edited_files_and_foreign_folders_are_not_overwritten(place: Place) -> None:
    sdist, dest = place.pin_sdist(), place.root / "build"
    dest.mkdir()
    (dest / "mine.txt").write_text("mine")
    assert "made by this tool" in place.fail("--sdist", sdist, "--apply", dest)
    (dest / "mine.txt").unlink()
    place.run("--sdist", sdist, "--apply", dest)
    (dest / "tools/mtmd/clip.cpp").write_text("edited")
    assert "got an edited file" in place.fail("--sdist", sdist, "--apply", dest)
    (dest / "tools/mtmd/clip.cpp").unlink()  # a missing file is simply written again
    assert place.run("--sdist", sdist, "--apply", dest).returncode == 0
    assert "hook();" in (dest / "tools/mtmd/clip.cpp").read_text()


def test_upstream_directory_is_checked_and_used(place: Place) -> None:
    place.pin_sdist()
    folder = place.root / TOP
    for name, text in sdist_files().items():
        path = place.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = place.run("--upstream-dir", folder, "--apply", place.root / "build")
    assert done.returncode == 0, done.stderr
    place.env["QAP_UPSTREAM_DIR"] = str(folder / "vendor" / "llama.cpp")  # a bare llama.cpp tree will do too
    assert place.run("--apply", place.root / "build").stderr.endswith("unchanged\n")
    (folder / "llama_cpp" / "__init__.py").write_text('__version__ = "1.2.4"\n')
    assert "got 1.2.4" in place.fail("--upstream-dir", folder)
    (folder / "vendor/llama.cpp/LICENSE").unlink()
    assert "expected LICENSE" in place.fail()
    assert "no folder at" in place.fail("--upstream-dir", place.root / "nothing")


def test_verify_prints_the_counts(place: Place) -> None:
    done = place.run("--sdist", place.pin_sdist(), "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "001-hooks.patch: 2 added, 0 removed, 1 file(s)",
        "002-encoder.patch: 1 added, 1 removed, 1 file(s)",
    ]


def test_verify_refuses_hooks_that_remove_or_grow(place: Place) -> None:
    sdist, hooks = place.pin_sdist(), place.root / "patches" / "001-hooks.patch"
    hooks.write_text(HOOKS.replace("@@ -1,5 +1,7 @@", "@@ -1,5 +1,46 @@").replace("+hook();\n", "+hook();\n" * 40))
    assert "41 added, 0 removed" in place.fail("--sdist", sdist, "--verify")
    hooks.write_text(HOOKS.replace("@@ -1,5 +1,7 @@", "@@ -1,5 +1,6 @@").replace(" line 3", "-line 3"))
    assert "2 added, 1 removed" in place.fail("--sdist", sdist, "--verify")
    hooks.unlink()
    assert "expected 001-hooks.patch" in place.fail("--sdist", sdist, "--verify")


def test_patch_parser_refuses_what_is_no_diff(place: Place) -> None:
    patch = place.root / "patches" / "001-hooks.patch"
    for text in ("only words\n", HOOKS[: HOOKS.index(" line 5")]):
        patch.write_text(text)
        with pytest.raises(upstream_patches.UpstreamError, match="expected a unified diff"):
            upstream_patches.read_patch(patch)
    patch.rename(place.root / "patches" / "hooks.patch")
    with pytest.raises(upstream_patches.UpstreamError, match=r"like 001-hooks\.patch"):
        upstream_patches.read_patches(place.root / "patches")


def git(work: Path, *words: str) -> None:
    subprocess.run(["git", "-C", work, *words], check=True, capture_output=True)


def refresh(place: Place, action: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return place.run(action, place.root / "work", *words, tool="refresh_patch.py")


@pytest.mark.skipif(shutil.which("git") is None, reason="refresh_patch.py needs git")
class TestRefresh:
    def test_edit_then_write_is_stable_and_keeps_headers(self, place: Place) -> None:
        place.pin_sdist()
        sdist, work, hooks = place.root / f"{TOP}.tar.gz", place.root / "work", place.root / "patches/001-hooks.patch"
        done = refresh(place, "edit", "--sdist", sdist)
        assert done.returncode == 0, done.stderr
        before = place.snapshot(place.root / "patches")
        assert refresh(place, "write").stderr.count("unchanged") == 2
        assert place.snapshot(place.root / "patches") == before

        clip = work / "tools/mtmd/clip.cpp"
        clip.write_text(clip.read_text() + "last line\n")
        assert "uncommitted" in place.fail("write", work, tool="refresh_patch.py")
        git(work, "commit", "-a", "-m", "003-more.patch", "-m", "Adds a line.")
        assert refresh(place, "write").returncode == 0
        added = (place.root / "patches" / "003-more.patch").read_text()
        assert added.startswith("Adds a line.\n\ndiff --git a/tools/mtmd/clip.cpp")
        assert "index " not in added
        assert hooks.read_text() == HOOKS
        assert place.run("--sdist", sdist, "--verify").returncode == 0

    def test_a_moved_pin_stops_with_rejects_and_goes_on(self, place: Place) -> None:
        place.pin_sdist()
        sdist, work, hooks = place.root / f"{TOP}.tar.gz", place.root / "work", place.root / "patches/001-hooks.patch"
        hooks.write_text(HOOKS.replace(" line 3", " line three"))
        assert "rejected hunks" in place.fail("edit", work, "--sdist", sdist, tool="refresh_patch.py")
        assert (work / "tools/mtmd/clip.cpp.rej").is_file()
        (work / "tools/mtmd/clip.cpp.rej").unlink()
        (work / "tools/mtmd/clip.cpp").write_text(CLIP.replace("line 3\n", "hook();\n++counter;\nline 3\n"))
        git(work, "add", "-A")
        git(work, "commit", "-F", ".git/QAP_MESSAGE")
        assert refresh(place, "edit", "--sdist", sdist).returncode == 0
        assert refresh(place, "write").returncode == 0
        assert hooks.read_text().startswith("Why this patch exists.\n\ndiff --git")
        assert place.run("--sdist", sdist, "--verify").returncode == 0

    def test_write_refuses_stray_commits_and_stale_files(self, place: Place) -> None:
        place.pin_sdist()
        work = place.root / "work"
        refresh(place, "edit", "--sdist", place.root / f"{TOP}.tar.gz")
        (place.root / "patches" / "009-stale.patch").write_text(ENCODER)
        assert "009-stale.patch" in place.fail("write", work, tool="refresh_patch.py")
        git(work, "commit", "--allow-empty", "-m", "fix things")
        assert "'fix things'" in place.fail("write", work, tool="refresh_patch.py")
