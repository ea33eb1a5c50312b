"""The command as a process with the packaged model: what a user sees, and that no input ends it by a signal."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap  # the fixtures below are its packaged model
from qap_gguf.eval import METHODS

QUESTION = "What is in the picture?"


def command(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", "qap_gguf", *map(str, words)]
    return subprocess.run(full, input=stdin, capture_output=True, text=True, timeout=300, check=False)


@functools.cache  # nobody changes what it returns
def answer(*words: str | Path) -> dict[str, Any]:
    done = command("run", "--json", "-p", QUESTION, *words)
    assert done.returncode == 0, done.stderr
    got: dict[str, Any] = json.loads(done.stdout)
    return got


def test_the_packaged_model_answers_from_18_of_144_tokens() -> None:
    got = answer("--n-keep", "18")
    (kept,) = got["kept"]
    assert got["answer"].strip()
    assert len(kept) == 18
    assert kept == sorted(set(kept))
    assert kept[0] >= 0
    assert kept[-1] < 144
    assert (got["stats"]["n_image_kept"], got["stats"]["n_image_tokens"]) == (18, 144)
    assert answer()["kept"] == answer("--keep-ratio", "0.25")["kept"]  # a quarter is the default


def test_keeping_all_is_dense_and_an_eighth_saves_that_many_cells() -> None:
    dense, full, cut = answer("--dense"), answer("--n-keep", "144"), answer("--n-keep", "18", "--max-tokens", "64")
    assert full["answer"] == dense["answer"]
    assert full["kept"] == dense["kept"] == [list(range(144))]
    assert dense["stats"]["n_prompt_tokens"] - cut["stats"]["n_prompt_tokens"] in (0, 126)  # with or without images
    cells = {name: g["stats"]["n_kv"] - g["stats"]["n_generated"] for name, g in {"dense": dense, "cut": cut}.items()}
    assert cells["dense"] - cells["cut"] == 126


def test_text_and_numbers_go_to_their_streams() -> None:
    done = command("run", "-p", QUESTION, "--n-keep", "18")
    assert done.returncode == 0
    assert done.stdout.strip() == answer("--n-keep", "18")["answer"].strip()
    assert "image tokens: 18 of 144 kept (12.5 %)" in done.stderr
    for word in ("encode", "score", "select", "prefill", "decode"):
        assert f"{word} " in done.stderr


def test_a_conversation_by_pipe() -> None:
    done = command("run", "--dense", stdin=f"{QUESTION}\nHow many objects are there?\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.count("144 of 144") == 2


def test_info_tells_versions_and_pin() -> None:
    done = command("info", "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert "0.3.36" in done.stdout
    assert command("info").stdout.count("\n") >= 5


def test_eval_counts_on_the_sample(tmp_path: Path) -> None:
    right = answer("--dense")["answer"]
    rows = [{"image": "s.png", "question": QUESTION, "answer": a, "kind": "caption"} for a in (right, "no such thing")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.open(qap.packaged_model().sample).save(tmp_path / "s.png")
    done = command("eval", tmp_path / "q.jsonl", "--n-keep", "18", "--json", "--max-tokens", "64")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    found = [r["method"] for r in results]
    assert found == [method for method in METHODS if method != "resize"]  # this tower takes one size
    assert (results[0]["n_right"], results[0]["n_total"], results[0]["n_kept"]) == (1, 2, 144)
    assert all(r["n_kept"] == 18 for r in results[1:])


def truncated(path: Path, out: Path, n_bytes: int) -> Path:
    out.write_bytes(path.read_bytes()[:n_bytes])
    return out


def test_what_cannot_work_is_one_line_and_exit_1(tmp_path: Path) -> None:
    files = qap.packaged_model()
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    short = truncated(files.mmproj, tmp_path / "short.gguf", 100_000)
    stub = truncated(files.mmproj, tmp_path / "stub.gguf", 40)
    cases: list[list[str | Path]] = [
        ["--image", text],
        ["--image", tmp_path],
        ["--image", tmp_path / "none.png"],
        ["-m", files.model, "--mmproj", short],
        ["-m", files.model, "--mmproj", stub],
        ["-m", files.model, "--mmproj", text],
        ["-m", files.model, "--mmproj", files.model],
        ["-m", files.model, "--mmproj", tmp_path / "none.gguf"],
        ["-m", files.mmproj, "--mmproj", files.mmproj],
        ["-m", text, "--mmproj", files.mmproj],
        ["--ctx", "16"],
        ["--device", "no such device"],
    ]
    for words in cases:
        done = command("run", "-p", QUESTION, *words)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("no --image")]
        assert done.returncode == 1, (words, done)  # a signal would be negative
        assert done.stdout == "", words
        assert len(lines) == 1, (words, lines)
        assert lines[0].startswith("qap-gguf: error: "), words
        assert "unexpected" not in lines[0], lines


def test_convert_of_nothing_is_one_line(tmp_path: Path) -> None:
    done = command("convert", tmp_path / "none", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_is_no_news() -> None:
    full = [sys.executable, "-m", "qap_gguf", "run", "-p", QUESTION]
    with subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        noise = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in noise
    assert "Exception ignored" not in noise
    assert "error" not in noise
