"""The ways of `qap-gguf convert` that take GGUF files, as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import qap_gguf as qap
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
