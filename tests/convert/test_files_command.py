"""The ways of `qap-gguf convert` that take GGUF files, as a user calls them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import qap_gguf as qap
from convert.gguf_files import LLAVA_KEYS, LLAVA_TENSORS, build
from qap_gguf.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """command(*words) -> exit status, stdout, stderr of `qap-gguf convert *words`."""

    def run(*words: object) -> tuple[int, str, str]:
        status = main(["convert", *map(str, words)])
        return status, *capsys.readouterr()

    return run


def test_annotate_changes_the_defaults_of_a_file(command: Command, tmp_path: Path) -> None:
    source, out = qap.packaged_model().mmproj, tmp_path / "a.gguf"
    assert command("--annotate", source, out, "--n-keep", 9, "--select", "dpp") == (0, f"{out}\n", "")
    status, said, _ = command("--annotate", out, out, "--alpha", 0.5, "--force", "--json")
    stored = json.loads(said)["metadata"]
    assert (status, stored["qap.n_keep"], stored["qap.select"], stored["qap.alpha"]) == (0, 9, "dpp", 0.5)
    status, said, error = command("--annotate", out, out, "--dense")
    assert (status, said, "--force" in error) == (1, "", True)
    status, said, _ = command("--annotate", out, out, "--dense", "--force", "--json")
    assert (status, json.loads(said)) == (0, {"mmproj": str(out), "metadata": None})
    assert out.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "give --keep-ratio"),
        (["a", "--n-keep", "3"], "Missing argument 'OUT'"),
        (["a", "b", "c", "--n-keep", "3"], "expected MMPROJ and OUT, got c too"),
        (["a", "b", "--n-keep", "3", "--quantize", "Q4_0"], "--quantize has no meaning with --annotate"),
        (["a", "b", "--n-keep", "3", "--dense"], "--dense keeps every token"),
    ],
)
def test_wrong_usage_of_annotate(command: Command, words: list[str], message: str) -> None:
    status, said, error = command("--annotate", *words)
    assert (status, said) == (2, "")
    assert message in " ".join(error.split())


def test_check_says_what_files_are(command: Command, plain_model: Path, tmp_path: Path) -> None:
    files = qap.packaged_model()
    own = qap.annotate(files.mmproj, tmp_path / "own.gguf", qap.PruneConfig(n_keep=18))
    status, said, error = command("--check", own, files.model)
    assert (status, error) == (0, "")
    lines = said.splitlines()
    assert lines[0] == f"{own}: mmproj, mlp"
    assert "  width of a token: 256, 144 tokens an image" in lines
    assert lines[1].startswith("  weights: f16 4.9 MB, f32 ")
    assert lines[1].endswith(" kB")
    assert lines[2] == "  image: image_size 192, patch_size 16"
    assert re.fullmatch(r"  memory: about [\d.]+ MB for the encoder and one picture", lines[3])
    assert "  pruning: semantic scores cls, text, attention" in lines
    assert any(line.startswith("  defaults: n_keep 18, alpha 0.7, error int4") for line in lines)
    assert any("its issue 25814" in line and line.endswith("qap_gguf fixes this") for line in lines)
    assert lines[-2:] == [f"{own} with {files.model}: fits", "  positions: keep"]
    (warning,) = [line for line in lines if "relabelled" in line]
    assert warning.startswith("  warning: stock llama.cpp: all image tokens of a picture get one position")
    assert warning.endswith("convert --keep-positions --undo gives the original. qap_gguf fixes this")
    lines = command("--check", own, plain_model)[1].splitlines()
    cure = f"relabel with qap-gguf convert --keep-positions {plain_model} OUT.gguf"
    assert lines[-2:] == [f"{own} with {plain_model}: fits", f"  positions: compact only; {cure}"]
    assert "relabelled" not in "\n".join(lines)


def test_check_fails_where_files_do_not_fit(command: Command, tmp_path: Path) -> None:
    files = qap.packaged_model()
    other = build(tmp_path / "other.gguf", LLAVA_KEYS, LLAVA_TENSORS)
    status, said, error = command("--check", other, files.model)
    assert (status, error) == (1, "")
    assert f"{other} with {files.model}: does not fit" in said
    status, said, _ = command("--check", tmp_path / "none.gguf", files.mmproj, "--json")
    assert (status, [file["kind"] for file in json.loads(said)["files"]]) == (1, ["unreadable", "mmproj"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing argument 'FILE...'"),
        (["a", "--n-keep", "3"], "--n-keep has no meaning with --check"),
        (["a", "--force"], "--force has no meaning with --check"),
        (["a", "--annotate"], "--annotate has no meaning with --check"),
    ],
)
def test_wrong_usage_of_check(command: Command, words: list[str], message: str) -> None:
    status, said, error = command("--check", *words)
    assert (status, said) == (2, "")
    assert message in " ".join(error.split())
