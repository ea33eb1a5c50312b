"""`qap-gguf batch`: killed in every way and gone on with, tables in and out, what it says last."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap
from batch.conftest import QUESTION, make_pictures
from qap_gguf.cli import main

pytestmark = pytest.mark.usefixtures("program")
#: A run of 200 pictures takes a minute or two: QAP_BATCH_PICTURES=200 makes it.
N = int(os.environ.get("QAP_BATCH_PICTURES") or 24)
DAMAGED = max(2, N // 40)
SAMPLE = qap.packaged_model().sample
TIMES = ("encode_s", "prefill_s", "decode_s")


def start(*words: str | Path) -> subprocess.Popen[str]:
    small = ("--threads", "1", "--ctx", "512")
    command = [sys.executable, "-m", "qap_gguf", "batch", *small, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run(words, code=0): the summary and the notes of a run in this process."""

    def call(*words: str | Path, code: int = 0) -> tuple[dict[str, Any], str]:
        small = () if code == 2 else ("--threads", "1", "--ctx", "512")
        assert main(["batch", *map(str, (*words, *small, "--json"))]) == code
        said = capsys.readouterr()
        return json.loads(said.out) if said.out else {}, said.err

    return call


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by id, without what depends on when they were asked; each is there once."""
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows = {row["id"]: {name: value for name, value in row.items() if name not in TIMES} for row in found}
    assert len(rows) == len(found)
    return rows


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: subprocess.Popen[str], path: Path, n: int) -> None:
    until = time.monotonic() + 300
    while lines(path) < n and time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_killed_three_times(run: Run, tmp_path: Path) -> None:
    """Politely, without mercy, and by Ctrl-C: every picture has one row, and the same as without."""
    make_pictures(tmp_path / "pictures", N, DAMAGED)
    words = (tmp_path / "pictures", "-p", QUESTION, "--parallel", "2")
    told, _ = run(*words, "-o", tmp_path / "whole.jsonl")
    assert (told["rows"], told["errors"]) == (N, DAMAGED)
    whole, out = rows_of(tmp_path / "whole.jsonl"), tmp_path / "out.jsonl"
    assert sum("error" in row for row in whole.values()) == DAMAGED
    assert len({row.get("answer") for row in whole.values()}) > 1
    n = 0
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = start(*words, "-o", out)
        wait_for(process, out, n + max(3, N // 5))
        process.send_signal(number)
        said, noted = process.communicate(timeout=60)
        n = lines(out)
        assert said == ""
        assert "Traceback" not in noted
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
            with out.open("ab") as file:  # what a loss of power may leave
                file.write(b'{"id": "torn')
        else:
            assert process.returncode == 130
            told_last = [line for line in noted.splitlines() if line][-1]
            assert told_last == f"stopped; {n} rows are in {out}: run the same command again to go on"
    assert n < N
    told, noted = run(*words, "-o", out)
    assert f"{n} of {N} rows are known" in noted
    assert (told["rows"], told["known"], told["errors"], told["restarts"]) == (N, n, DAMAGED, 0)
    assert rows_of(out) == whole
    before = out.read_bytes()
    told, _ = run(*words, "-o", out)  # nothing is left to do
    assert (told["known"], out.read_bytes()) == (N, before)


def test_a_folder_that_changes(run: Run, tmp_path: Path) -> None:
    """As many pictures as before, but another one among them."""
    for name in ("a.png", "b.png"):
        shutil.copy(SAMPLE, tmp_path / name)
    words = (tmp_path, "-o", tmp_path / "out.jsonl", "-p", QUESTION)
    run(*words)
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    told, noted = run(*words)
    assert "1 of 2 rows are known" in noted
    assert (told["known"], told["rows"]) == (1, 3)
    assert set(rows_of(tmp_path / "out.jsonl")) == {"a.png", "b.png", "c.png"}


def test_other_settings_and_a_new_beginning(run: Run, tmp_path: Path) -> None:
    shutil.copy(SAMPLE, tmp_path / "a.png")
    words = (tmp_path / "*.png", "-o", tmp_path / "out.jsonl")
    run(*words, "-p", QUESTION)
    before = (tmp_path / "out.jsonl").read_bytes()
    _, noted = run(*words, "-p", "How many objects are there?", "--n-keep", "72", code=1)
    assert len(noted.splitlines()) == 1
    assert "rows of a run with another prompt, prune; choose another file, or say --restart" in noted
    assert (tmp_path / "out.jsonl").read_bytes() == before
    run(*words, "-p", "How many objects are there?", "--dense", "--restart")
    assert rows_of(tmp_path / "out.jsonl")[str(tmp_path / "a.png")]["answer"] == "four"


def test_a_table_to_a_table(run: Run, tmp_path: Path) -> None:
    shutil.copy(SAMPLE, tmp_path / "a.png")
    table = tmp_path / "rows.csv"
    table.write_text(
        "id,image,prompt,n_keep,label\n1,a.png,,72,x\n2,a.png,How many objects are there?,,y\n3,b.png,,,z\n"
    )
    told, noted = run(table, "-o", tmp_path / "out.csv", "-p", QUESTION, "--dense", "--quiet")
    assert noted == ""
    assert told["errors"] == 1
    told, noted = run(table, "-o", tmp_path / "out.csv", "-p", QUESTION, "--dense")
    assert "columns that mean nothing here: label" in noted
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert [rows[i]["answer"] for i in "123"] == ["house", "four", ""]
    assert [rows[i]["kept"] for i in "123"] == ["72", "144", ""]
    assert "none at" in rows["3"]["error"]
    shutil.copy(SAMPLE, tmp_path / "b.png")
    told, _ = run(table, "-o", tmp_path / "out.csv", "-p", QUESTION, "--dense", "--retry-errors")
    assert (told["known"], told["errors"], told["rows"]) == (2, 0, 3)


def test_openais_file(run: Run, tmp_path: Path) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": SAMPLE.resolve().as_uri()}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": "gpt", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    row = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"custom_id": "r2", "body": {}}) + "\n"
    )
    told, _ = run(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--dense")
    assert (told["rows"], told["errors"]) == (2, 1)
    rows = {row["custom_id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert rows["r1"]["response"]["body"]["choices"][0]["message"]["content"] == "house"
    assert rows["r2"]["response"]["status_code"] == 400
    _, noted = run(tmp_path / "in.jsonl", "-o", tmp_path / "new.jsonl", "-p", "What?", code=2)
    assert "have their own messages" in noted


def test_a_schema(run: Run, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"n": {"enum": [4]}}, "required": ["n"]}')
    run(SAMPLE, "-o", tmp_path / "out.jsonl", "-p", QUESTION, "--schema", tmp_path / "schema.json")
    (row,) = rows_of(tmp_path / "out.jsonl").values()
    assert json.loads(row["answer"]) == {"n": 4}


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("none", "-o", "out.jsonl", "-p", "?"), 1, "expected a folder, a pattern, a picture, a list or a table"),
        ((SAMPLE, "-o", "out.txt", "-p", "?"), 1, "expected a name that ends in .jsonl, .ndjson or .csv"),
        ((SAMPLE, "-o", "out.jsonl", "-p", " "), 2, "-p/--prompt is empty"),
        ((SAMPLE, "-o", "out.jsonl", "--parallel", "0"), 2, "expected auto or a number from 1 to 64"),
        ((SAMPLE, "-o", "out.jsonl", "-p", "?", "--schema", "none"), 1, "--schema: expected a file"),
        ((SAMPLE, "-p", "?"), 2, "Missing option"),
    ],
)
def test_wrong_words(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str | Path, ...], code: int, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _, noted = run(*words, code=code)
    assert why in " ".join(noted.split())
    assert not list(tmp_path.iterdir())
