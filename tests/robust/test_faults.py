"""Interrupted, killed, starved and simultaneous work: no half file under a final name, and the work resumes.

tools/fuzz/faults.py strikes conversions at every step and prints counts; here it strikes at some.
"""

from __future__ import annotations

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

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.children import environment
from fault_points import CacheWrites, Evaluation
from faults import DONE, REFUSED, Conversion, hashes, in_child, strike, strike_work
from qap_gguf.files.atomic import shared, temporary_name
from qap_gguf.files.gguf import check_pair
from qap_gguf.vision.store import EmbeddingStore, pack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and signals")


@pytest.fixture(scope="module")
def conversion(plain_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(plain_llava, "F16", tmp_path_factory.mktemp("want"))


def test_conversions_struck_at_many_points(plain_llava: Path) -> None:
    found = strike(plain_llava, ("F16", "Q8_0"), every=12)
    assert {what.rsplit(" ", 1)[0] for what in found} == {
        "SIGKILL", "SIGINT", "full disk", "SIGKILL between two names", "SIGKILL at a line", "SIGINT at a line",
    }  # fmt: skip
    for kind in ("F16", "Q8_0"):
        for place in ("", "at a line "):
            assert set(found[f"SIGKILL {place}{kind}"]) == {"ended by SIGKILL"}
            assert set(found[f"SIGINT {place}{kind}"]) == {"interrupted"}
    assert found["full disk F16"]["refused"] >= 1
    assert found["full disk Q8_0"]["refused"] >= 1


def test_cache_writes_struck_at_many_lines() -> None:
    found = strike_work(CacheWrites(), every=8)
    assert set(found["SIGKILL cache writes"]) == {"ended by SIGKILL"}
    assert set(found["SIGINT cache writes"]) == {"interrupted"}
    assert set(found["full disk cache writes"]) == {"done"}  # a warning: the answer does not depend on it
    assert found["SIGKILL cache writes"].total() > 15


def test_evaluations_struck_at_many_lines(tmp_path: Path) -> None:
    found = strike_work(Evaluation(tmp_path / "want"), every=15)
    assert set(found["SIGKILL eval --out"]) == {"ended by SIGKILL"}
    assert set(found["SIGINT eval --out"]) == {"interrupted"}
    assert set(found["full disk eval --out"]) == {"refused", "done"}
    assert found["SIGKILL eval --out"].total() > 15


def test_harm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws can be broken: here a file of the cache gets its name before its content."""

    def save(store: EmbeddingStore, key: str, image: qap.ImageEmbedding) -> None:
        data = pack(key, image)
        with store.path(key).open("wb") as file:
            for start in range(0, len(data), 400):
                file.write(data[start : start + 400])
                file.flush()

    work = CacheWrites()
    work.files = {__file__}
    monkeypatch.setattr(EmbeddingStore, "save", save)
    with pytest.raises(AssertionError):
        strike_work(work, every=1)


def test_what_a_killed_process_left_is_removed_and_nothing_else(conversion: Conversion, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert in_child(conversion.struck_by(signal.SIGKILL, 3), out) == -signal.SIGKILL
    left = hashes(out)
    assert left
    assert all(name.startswith(".") and name.endswith(".qap-tmp") for name in left)
    others = {".m-F16.gguf.0011aabb.tmp": b"1", "m.qap-tmp": b"2", ".hidden": b"3"}
    for name, data in others.items():
        (out / name).write_bytes(data)
    conversion.run(out)
    assert hashes(out).keys() == conversion.want.keys() | others.keys()


def test_a_process_that_lives_keeps_its_temporary_files(conversion: Conversion, tmp_path: Path) -> None:
    """While one conversion is at work, another one in the same folder begins and ends."""
    second: list[int] = []

    def between(done: int, total: int, _: str) -> None:
        if done == total // 2:
            before = set(hashes(tmp_path))
            second.append(in_child(conversion.run, tmp_path))
            assert before <= set(hashes(tmp_path))

    with pytest.raises(qap.QapError, match="found one"):  # the second was faster; its files stay
        conversion.run(tmp_path, progress=between)
    assert second == [DONE]
    assert hashes(tmp_path) == conversion.want


def test_two_at_once(conversion: Conversion, tmp_path: Path) -> None:
    """Both want the same names: one gets them, the other says so; with force both do."""
    for number, force in enumerate((False, False, False, True, True)):
        out = tmp_path / str(number)
        pids = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                os._exit(in_child(lambda folder, force=force: conversion.run(folder, force=force), out))  # type: ignore[misc]
            pids.append(pid)
        ends = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
        assert ends in ([[DONE, DONE]] if force else [[DONE, REFUSED]]), (number, ends)
        assert hashes(out) == conversion.want


def test_two_processes_that_share_a_cache(tmp_path: Path) -> None:
    """`bench --shape` keeps its files in a cache: whoever comes second takes what is there, also in the same moment."""

    def make(folder: Path) -> None:
        from bench.test_shapes import tiny
        from qap_gguf.bench.random_files import make_random_model

        made = make_random_model(tiny("llava-1.5-7b"), folder)
        check_pair(made.mmproj, made.model, 64)

    for number in range(4):
        folder = tmp_path / str(number)
        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                os._exit(in_child(make, folder))
            pids.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [DONE] * 3
        assert len(hashes(folder)) == 2
        assert not any(name.startswith(".") for name in hashes(folder))


def test_a_folder_that_nobody_writes_to_is_cleaned_once(tmp_path: Path) -> None:
    stale = temporary_name(tmp_path / "a.gguf")
    stale.write_bytes(b"x")
    with shared(tmp_path):
        assert not stale.exists()
        stale.write_bytes(b"x")
        with shared(tmp_path):  # a writer lives: this may be its file
            assert stale.exists()


def test_a_model_file_that_is_replaced_while_it_is_used(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    """As `convert --force` and `annotate --force` replace: by a rename. The loaded model keeps the old file."""
    mmproj, model = (Path(shutil.copy(path, tmp_path)) for path in (packaged.mmproj, packaged.model))
    with qap.VisionModel(mmproj, model, n_threads=1) as vlm:
        before = vlm.generate([packaged.sample, "List the objects in row order."], max_tokens=8)
        qap.annotate(mmproj, mmproj, qap.PruneConfig(n_keep=7), force=True)
        other = tmp_path / "other"
        other.write_bytes(b"no model")
        os.replace(other, model)
        assert vlm.generate([packaged.sample, "List the objects in row order."], max_tokens=8) == before
    with pytest.raises(qap.QapError, match="expected a GGUF file"):
        qap.VisionModel(mmproj, model)
    with qap.VisionModel(mmproj, packaged.model, n_threads=1) as vlm:
        assert vlm.file_config is not None
        assert vlm.file_config.n_keep == 7


@pytest.fixture
def evaluation(tmp_path: Path, packaged: qap.PackagedModel) -> Callable[..., subprocess.Popen[str]]:
    """Start `qap-gguf eval --json` on 24 questions about the packaged picture."""
    shutil.copy(packaged.sample, tmp_path / "a.png")
    rows = [{"image": "a.png", "question": f"What is number {i} of the objects?", "answer": "boat"} for i in range(24)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "qap_gguf", "eval", str(tmp_path / "q.jsonl"), "--threads", "1", "--json"]
    words += ["--methods", "dense,qap,random"]

    def start(*more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*words, *more], stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=tmp_path)

    return start


def wait_until_it_maps(process: subprocess.Popen[str], file: Path) -> None:
    """Until the child has the language model before it: a signal while Python starts is Python's to answer."""
    maps = Path(f"/proc/{process.pid}/maps")
    for _ in range(6000):
        if file.name in maps.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the child never loaded the model")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_an_evaluation_struck(
    evaluation: Callable[[], subprocess.Popen[str]], tmp_path: Path, packaged: qap.PackagedModel
) -> None:
    """Without --out it writes no file that could be half: it prints all or nothing, and runs again."""
    before = hashes(tmp_path)
    table = right(evaluation().communicate(timeout=120)[0])
    for number, delay in ((signal.SIGINT, 0.0), (signal.SIGINT, 0.3), (signal.SIGKILL, 0.2)):
        process = evaluation()
        wait_until_it_maps(process, packaged.model)
        time.sleep(delay)
        process.send_signal(number)
        said, noted = process.communicate(timeout=120)
        assert said == ""
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), noted
        assert "Traceback" not in noted, noted
    assert hashes(tmp_path) == before
    assert right(evaluation().communicate(timeout=120)[0]) == table


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as above")
def test_an_evaluation_that_writes_struck(evaluation: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Killed, interrupted, killed again, each time when some more answers are in the journal: the fourth run ends."""
    table, out = right(evaluation().communicate(timeout=120)[0]), tmp_path / "out"
    lines = 1  # the header
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = evaluation("--out", str(out))
        until, lines = time.monotonic() + 60, lines + 3
        while time.monotonic() < until and process.poll() is None and count(out / "journal.jsonl") < lines:
            time.sleep(0.01)
        process.send_signal(number)
        said, noted = process.communicate(timeout=120)
        assert said == ""
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), noted
        assert {path.name for path in out.iterdir()} == {"journal.jsonl"}
        lines = count(out / "journal.jsonl")
    said, noted = evaluation("--out", str(out)).communicate(timeout=120)
    assert f"{lines - 1} answers are known" in noted
    assert right(said) == right((out / "results.json").read_text()) == table
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def count(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def right(said: str) -> list[tuple[Any, ...]]:
    """Method, tokens kept and share of right answers of each row, from the JSON of an evaluation."""
    rows = json.loads(said)["results"]
    assert len(rows) >= 3
    return [(row["method"], row["n_kept"], row["accuracy"]) for row in rows]
