"""`run` with one question: options, streams, wrong usage of every subcommand, errors and exit statuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qap_gguf.cli import main
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError

Said = pytest.CaptureFixture[str]


# --- run, one question ------------------------------------------------------------------------------------------------


def test_run_streams_the_answer_and_notes_the_numbers(fake: Any, tmp_path: Path, capsys: Said) -> None:
    assert main(["run", "-p", "What?"]) == 0
    said = capsys.readouterr()
    assert said.out == "a dog\n"
    assert said.err.splitlines() == [
        f"no --image, so this is about the packaged sample {tmp_path / 's.png'}",
        "image tokens: 36 of 144 kept (25.0 %)",
        "encode 50.0 ms, score 1.0 ms, select 0.1 ms, prefill 20.0 ms, decode 40.0 ms (50.0 tokens/s)",
    ]
    assert fake.only().files == (tmp_path / "mmproj.gguf", tmp_path / "model.gguf")
    assert fake.only().kwargs == {
        "device": None,
        "kv": None,
        "model_device": None,
        "n_ctx": 2048,
        "n_threads": None,
        "seed": 0,
        "check": "child",
        "verbose": False,
    }
    (call,) = fake.only().calls
    assert call["parts"][-1] == "What?"
    assert (call["prune"], call["max_tokens"], call["temperature"]) == (PruneConfig(), 64, 0.0)
    assert fake.only().closed


def test_run_passes_on_what_was_asked_for(fake: Any, capsys: Said) -> None:
    words = (
        "run -m m.gguf --mmproj p.gguf --image a.png --image b.png -p Hi --max-tokens 5 --temperature 0.5 --threads 3 "
        "--device cpu --model-device all --kv q8_0 --max-image-tokens 99 --force-family "
        "--ctx 512 --n-keep 9 --alpha dynamic --error int8 --group-size 32 "
        "--outlier range "
        "--outlier-weight 0.25 --semantic none --select random --positions compact --seed 4294967298 --debug"
    )
    assert main(words.split()) == 0
    assert fake.only().files == (Path("p.gguf"), Path("m.gguf"))
    assert fake.only().kwargs == {
        "device": "cpu", "kv": "q8_0", "model_device": "all", "n_ctx": 512, "n_threads": 3, "seed": 2, "check": "child",
        "verbose": True,
    }  # fmt: skip
    assert (fake.only().limit, os.environ.get("QAP_MAX_IMAGE_TOKENS")) == ("99", None)  # while it ran, and now
    assert (fake.only().forced, os.environ.get("QAP_FORCE_FAMILY")) == ("1", None)
    assert fake.only().encoded == [Path("a.png"), Path("b.png")]
    (call,) = fake.only().calls
    assert (call["max_tokens"], call["temperature"]) == (5, 0.5)
    assert call["prune"] == PruneConfig(
        n_keep=9, alpha="dynamic", error="int8", group_size=32, outlier_weight=0.25, semantic="none", select="random",
        positions="compact", seed=4294967298,
    )  # fmt: skip
    assert "18 of 288" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--dense", "--no-prune"])
def test_dense_prunes_nothing(fake: Any, flag: str, capsys: Said) -> None:
    assert main(["run", "-p", "What?", flag]) == 0
    assert fake.only().calls[0]["prune"] is None
    assert "144 of 144 kept (100.0 %)" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "n_kept"), [([], 36), (["--keep-ratio", "0.5"], 72), (["--dense"], 144)])
def test_json_is_one_object_and_nothing_else(flags: list[str], n_kept: int, tmp_path: Path, capsys: Said) -> None:
    assert main(["run", "--json", "--image", "a.png", "-p", "What?", *flags]) == 0
    said = capsys.readouterr()
    got = json.loads(said.out)
    assert said.err == ""
    assert set(got) == {"answer", "prompt", "model", "mmproj", "images", "config", "stats", "kept"}
    assert (got["answer"], got["prompt"], got["images"]) == ("a dog", "What?", ["a.png"])
    assert (got["model"], got["mmproj"]) == (str(tmp_path / "model.gguf"), str(tmp_path / "mmproj.gguf"))
    assert got["kept"] == [list(range(n_kept))]
    assert got["stats"]["n_image_kept"] == n_kept
    assert (got["config"] is None) == (flags == ["--dense"])


# --- wrong usage: exit 2 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "-m", "m.gguf", "-p", "x"], "-m/--model needs --mmproj too"),
        (["run", "--mmproj", "m.gguf", "-p", "x"], "--mmproj needs -m/--model too"),
        (["eval", "q.jsonl", "-m", "m.gguf"], "-m/--model needs --mmproj too"),
        (["run", "--n-keep", "3", "--keep-ratio", "0.5"], "--n-keep and --keep-ratio exclude each other"),
        (["eval", "q.jsonl", "--n-keep", "3", "--keep-ratio", "0.5"], "--n-keep and --keep-ratio exclude each other"),
        (["convert", "a", "b", "--n-keep", "3", "--keep-ratio", "0.5"], "--n-keep and --keep-ratio exclude"),
        (["run", "--n-keep", "0"], "0 is not in the range"),
        (["run", "--keep-ratio", "0"], "keep_ratio must be"),
        (["run", "--keep-ratio", "nan"], "keep_ratio must be"),
        (["eval", "q.jsonl", "--keep-ratio", "1.5"], "keep_ratio must be"),
        (["run", "--alpha", "2"], "alpha must be"),
        (["run", "--alpha", "nan"], "alpha must be"),
        (["run", "--alpha", "fast"], "expected a number in 0..1 or \"dynamic\", got 'fast'"),
        (["run", "--error", "q9_0"], "'int2', 'int3'"),
        (["run", "--group-size", "0"], "0 is not in the range"),
        (["run", "--seed", str(2**64)], "is not in the range"),
        (["run", "--outlier-weight", "-1"], "outlier_weight must be"),
        (["run", "--dense", "--n-keep", "3"], "--dense keeps every token, so --n-keep has no meaning"),
        (["run", "--no-prune", "--outlier-weight", "1"], "so --outlier-weight has no meaning"),
        (["run", "--json"], "give it with -p/--prompt"),
        (["run", "-p", " "], "write a question"),
        (["run", "--temperature", "-1", "-p", "x"], "is not in the range"),
        (["convert", "a", "b", "--seed", "1"], "No such option"),
        (["convert", "a"], "Missing argument 'OUT'"),
        (["eval", "q.jsonl", "--methods", "best"], "got best"),
        (["eval", "q.jsonl", "--methods", ","], "got none"),
        (["fly"], "No such command"),
        ([], "Usage: qap-gguf"),
    ],
)
def test_wrong_usage_is_explained_on_stderr(fake: Any, words: list[str], says: str, capsys: Said) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert "Traceback" not in said.err
    assert fake.opened == []


# --- errors: exit 1, 130 ----------------------------------------------------------------------------------------------


def test_our_errors_are_one_line(fake: Any, capsys: Said) -> None:
    assert main(["run", "--image", "broken.png", "-p", "x"]) == 1
    said = capsys.readouterr()
    assert said.err == "qap-gguf: error: expected a picture, got broken.png; choose another file\n"
    assert said.out == ""
    assert fake.only().closed


def test_other_errors_are_one_line_that_names_debug(fake: Any, capsys: Said) -> None:
    fake.says = ["a", KeyError("x")]
    assert main(["run", "--image", "a.png", "-p", "x"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "qap-gguf: error: unexpected KeyError: 'x'; run again with --debug for the traceback"


def test_a_file_that_cannot_be_read_is_no_bug(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setattr(fake, "encode", lambda *_: Path("/nonexistent/a.png").read_bytes())
    assert main(["run", "--image", "a.png", "-p", "x"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "/nonexistent/a.png" in line
    assert "unexpected" not in line


@pytest.mark.parametrize("says", [KeyError("x"), ConfigError("y")])
def test_the_traceback_comes_with_debug_only(fake: Any, says: Exception, capsys: Said) -> None:
    fake.says = [says]
    assert main(["run", "--image", "a.png", "-p", "x", "--debug"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("qap-gguf: error: ")
    assert main(["run", "--image", "a.png", "-p", "x"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_an_interruption_ends_with_130(fake: Any, capsys: Said) -> None:
    fake.says = ["a ", KeyboardInterrupt()]
    assert main(["run", "--image", "a.png", "-p", "x"]) == 130
    said = capsys.readouterr()
    assert said.out == "a \n"  # what came is shown, and the line is ended
    assert "Traceback" not in said.err
    assert fake.only().closed


def test_a_closed_pipe_is_no_news(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    for err in (BrokenPipeError(), BrokenPipeError(32, "Broken pipe")):
        fake.says = [err]
        assert main(["run", "--image", "a.png", "-p", "x"]) == 1
        assert capsys.readouterr().err.strip() == ""
