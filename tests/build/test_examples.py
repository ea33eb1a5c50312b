"""The examples run as they are, in interpreters of their own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap

ONE = ("--threads", "1")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: str | Path, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of an example."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout, done.stderr


def test_all_are_tested_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "call_server.py", "caption_folder.py", "plain_llama_cpp_python.py", "ten_questions.py",
    }  # fmt: skip


def folder_of_pictures(folder: Path) -> Path:
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "d.png", "deep/e.png", "deep/er/f.PNG"):
        shutil.copy(qap.packaged_model().sample, folder / name)
    (folder / "b.png").write_bytes(b"no picture")
    (folder / "c.txt").write_text("text")
    (folder / "g.png").mkdir()
    return folder


NAMES = ["a.png", "d.png", "deep/e.png", "deep/er/f.PNG"]


def test_caption_folder(tmp_path: Path) -> None:
    """All pictures, in folders too; a damaged one stops nothing."""
    folder = folder_of_pictures(tmp_path / "pictures")
    out, err = run("caption_folder.py", folder, *ONE, "--n-keep", "144", code=1)
    assert out == "".join(f"{name}\tfour\n" for name in NAMES)
    assert err.startswith("b.png: image: ")
    assert err.count("\n") == 1


def test_caption_folder_goes_on(tmp_path: Path) -> None:
    """What has a line is passed over, a line that was cut off is made again, and more tokens than there are is all."""
    folder, captions = folder_of_pictures(tmp_path / "pictures"), tmp_path / "captions.tsv"
    captions.write_text("a.png\tknown\ndeep/e.png\tknown\nd.png\tfo")
    out, _ = run("caption_folder.py", folder, *ONE, "--n-keep", "999", "--out", captions, code=1)
    assert out == ""
    lines = captions.read_text().splitlines()
    assert lines == ["a.png\tknown", "deep/e.png\tknown", "d.png\tfour", "deep/er/f.PNG\tfour"]


def test_caption_folder_that_is_ended(tmp_path: Path) -> None:
    """Lines are in the file at once, though it is no terminal: a signal loses none."""
    folder = folder_of_pictures(tmp_path / "pictures")
    for number in range(200):
        (folder / f"h{number:03}.png").symlink_to(folder / "a.png")
    with (tmp_path / "out").open("wb") as file:
        child = subprocess.Popen([sys.executable, EXAMPLES / "caption_folder.py", folder, *ONE], stdout=file)
        while not (tmp_path / "out").read_bytes().count(b"\n") >= 2:
            assert child.poll() is None
            time.sleep(0.01)
        child.terminate()
        child.wait(30)
    assert (tmp_path / "out").read_text().startswith("a.png\t")


def test_ten_questions() -> None:
    out, _ = run("ten_questions.py", *ONE, "--n-keep", "72")
    lines = out.splitlines()
    assert len(lines) == 12
    assert re.fullmatch(r"What is in row 1, column 2\? +[\d.]+ +[\d.]+  house", lines[2])
    assert lines[-1].endswith("encoder passes: 1")
    out, _ = run("ten_questions.py", *ONE, "--rounds", "2", "--json")
    figures = json.loads(out)
    assert figures["encoder_passes"] == 1
    assert min(figures["first_ms"], figures["others_median_ms"], figures["stock_median_ms"]) > 0


def test_plain_llama_cpp_python() -> None:
    out, err = run("plain_llama_cpp_python.py", *ONE, "--n-keep", "72")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["all", "72"]
    assert [row[-1] for row in rows] == ["house", "house"]
    assert err == ""  # no log


def test_call_server() -> None:
    pytest.importorskip("openai", reason="needs the openai client")
    from serve.conftest import serving

    with serving("--ctx", "512") as server:
        out, _ = run("call_server.py", "--port", server.url.rpartition(":")[2])
    assert out.splitlines()[-2:] == ["{'n_keep': 72}: house", "None: house"]
