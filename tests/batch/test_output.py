"""What a run leaves: rows that are whole, settings that fit, and one writer."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qap_gguf.batch.output import Output
from qap_gguf.batch.results import BatchResult
from qap_gguf.errors import ConfigError, DataError

SETTINGS = {"prompt": "What?", "n": 3}
RESULTS = [
    BatchResult("a,1", "a.png", 'one "two"\nthree', "stop", 5, 2, 144, 36, 0.5, 0.25, 0.125),
    BatchResult("b", "b.png", error="image: no picture"),
    BatchResult("caf\u00e9", None, "caf\u00e9", "length"),
]


def write(path: Path, results: list[BatchResult], **words: Any) -> Output:
    with Output(path, SETTINGS, **words) as output:
        for result in results:
            if result.id not in output.known:
                output.add(result)
    return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_that_was_cut_anywhere_goes_on(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a killed process or a loss of power leaves it: within a letter, between quotation marks, in the first line."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # it takes its time, and there are hundreds of cuts
    path = tmp_path / f"out{suffix}"
    write(path, RESULTS)
    whole = path.read_bytes()
    assert [row["id"] for row in rows_of(path)] == [result.id for result in RESULTS]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        write(path, RESULTS)
        assert path.read_bytes() == whole, cut


def test_rows_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is synced after it is written, the settings before the first one."""
    real, synced = os.fsync, []

    def sync(number: int) -> None:
        real(number)
        synced.append(Path(f"/proc/self/fd/{number}").resolve().name)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc here")
    monkeypatch.setattr("os.fsync", sync)
    path = tmp_path / "out.jsonl"
    with Output(path, SETTINGS) as output:
        before = synced.count("out.jsonl")
        assert any(name.startswith(".out.jsonl.settings.json") for name in synced)
        for number, result in enumerate(RESULTS, start=1):
            output.add(result)
            assert synced.count("out.jsonl") == before + number


def test_a_last_line_of_nothing(tmp_path: Path) -> None:
    """Some file systems give zeros for what was not written in time."""
    path = tmp_path / "out.jsonl"
    write(path, RESULTS)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 50 + b"\n")
    write(path, RESULTS)
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"nonsense\n" + whole)
    with pytest.raises(DataError, match="line 4: expected a record of this run"):
        write(path, RESULTS)


def test_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, RESULTS)
    before = path.read_bytes()
    with pytest.raises(DataError, match="another prompt, more; choose another file, or say --restart"):
        Output(path, {"prompt": "Where?", "n": 3, "more": 1})
    assert path.read_bytes() == before
    with Output(path, {"prompt": "Where?", "n": 3}, restart=True) as output:
        assert not output.known
    write(path, [], restart=True)
    assert write(path, RESULTS).known == {result.id for result in RESULTS}


def test_somebody_elses_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("no line break")
    with pytest.raises(DataError, match=r"expected a file of this command's with out\.csv\.settings\.json beside it"):
        Output(path, SETTINGS)
    assert path.read_text() == "no line break"
    for name in ("out.txt", "out"):
        with pytest.raises(ConfigError, match="expected a name that ends in"):
            Output(tmp_path / name, SETTINGS)
    with pytest.raises(ConfigError, match="JSON lines for OpenAI"):
        Output(tmp_path / "new.csv", SETTINGS, is_openai=True)


def test_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Output(path, SETTINGS) as output:
        output.add(RESULTS[0])
        with pytest.raises(DataError, match="another process writes to it"):
            Output(path, SETTINGS)
        with pytest.raises(DataError, match="another process writes to it"):
            Output(path, SETTINGS, restart=True)
    assert len(rows_of(path)) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rows_with_an_error_again(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    assert write(path, RESULTS).n_errors == 1
    with Output(path, SETTINGS, retry_errors=True) as output:
        assert output.known == {"a,1", "caf\u00e9"}
        output.add(BatchResult("b", "b.png", "now"))
    assert [row["id"] for row in rows_of(path)] == ["a,1", "caf\u00e9", "b"]
    assert write(path, []).n_errors == 0


def test_openais_rows(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    results = [BatchResult("a", response={}), BatchResult("b", error="no", status=400)]
    assert write(path, results, is_openai=True).n_errors == 1
    with Output(path, SETTINGS, is_openai=True, retry_errors=True) as output:
        assert output.known == {"a"}


def test_a_full_disk(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "out.jsonl").symlink_to(full)
    with pytest.raises(DataError):
        Output(tmp_path / "out.jsonl", SETTINGS, restart=True)
