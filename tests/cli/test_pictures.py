"""What --image takes, help in groups, --quiet, and tables that fit a screen."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from qap_gguf.cli import main
from qap_gguf.cli.main import cli
from qap_gguf.cli.output import split_table
from qap_gguf.cli.pictures import find_pictures
from qap_gguf.eval import markdown
from qap_gguf.vision import sources

Said = pytest.CaptureFixture[str]
WEB = "https:" + "//example/a.png"


def ask(*words: str | Path) -> int:
    return main(["run", "-p", "What?", *map(str, words)])


def test_a_pattern(fake: Any, tmp_path: Path, capsys: Said) -> None:
    """As a shell would have it: in the order of the names; a file of such a name is that file."""
    for name in ("p2.png", "p10.png", "q.png", "p[1].png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "p3.png").mkdir()
    assert ask("--image", tmp_path / "p*.png", "--image", tmp_path / "q.png") == 0
    assert [path.name for path in fake.only().encoded] == ["p10.png", "p2.png", "p[1].png", "q.png"]
    assert [name for name, _ in find_pictures([str(tmp_path / "p[1].png")], False)] == [str(tmp_path / "p[1].png")]
    assert ask("--image", tmp_path / "z*.png") == 2
    assert "the pattern fits none" in capsys.readouterr().err


def test_stdin(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the bytes of a picture")))
    assert ask("--image", "-") == 0
    assert fake.only().encoded == [b"the bytes of a picture"]
    assert ask("--image", "-", "--image", "-") == 2
    assert "give it once" in capsys.readouterr().err
    assert main(["run", "--image", "-"]) == 2
    assert "-p/--prompt" in capsys.readouterr().err


def test_an_address(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    asked: list[str] = []

    def fetch(url: str, **_: Any) -> bytes:
        asked.append(url)
        return b"fetched"

    monkeypatch.setattr(sources, "fetch", fetch)
    assert ask("--image", WEB) == 2
    said = capsys.readouterr().err
    assert WEB in said
    assert "--allow-urls" in said
    assert asked == []
    assert ask("--image", WEB, "--allow-urls", "--json") == 0
    assert fake.only().encoded == [b"fetched"]
    assert json.loads(capsys.readouterr().out)["images"] == [WEB]
    assert main(["score", WEB]) == 2
    assert "--allow-urls" in capsys.readouterr().err


def test_a_data_uri(fake: Any) -> None:
    assert ask("--image", "data:image/png;base64,aGVsbG8=") == 0
    assert fake.only().encoded == [b"hello"]


@pytest.mark.parametrize(
    "name", [name for name in cli.commands if name not in ("info", "quantize")]
)  # these prune nothing
def test_help_in_groups(name: str, capsys: Said) -> None:
    """What most need first, research last, each option once."""
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    heads = [line.rstrip(":") for line in said.splitlines() if line and not line.startswith(" ") and line.endswith(":")]
    groups = [head for head in heads if head in ("Options", "Model", "Pruning", "Output", "Advanced")]
    order = ["Options", "Model", "Pruning", "Output", "Advanced"]
    assert groups == [group for group in order if group in groups]
    assert {"Options", "Output", "Advanced"} <= set(groups)
    for research in ("--outlier-weight", "--group-size", "--semantic"):
        assert said.index(f"\n  {research} ") > said.index("Advanced:")
    options = [p for p in cli.commands[name].params if isinstance(p, click.Option) and not p.hidden]
    for option in options:
        word = max(option.opts, key=len)
        rows = [line for line in said.splitlines() if line.lstrip().startswith(tuple(option.opts))]
        assert any(word in row for row in rows), word


def test_quiet(fake: Any, capsys: Said) -> None:
    assert ask("--quiet") == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a dog\n", "")
    assert ask("--quiet", "--image", "broken.png") == 1
    assert capsys.readouterr().err.startswith("qap-gguf: error: ")


def test_wide_tables_are_split() -> None:
    head = ("method", "model", "K", *(f"vs method {i}, points" for i in range(7)), "prefill ms")
    rows = [(f"dpp-{i}", "tiny", "18", *["-12.3 (-20.1 to -4.0)"] * 7, "20.1") for i in range(4)]
    parts = split_table((head, rows))
    assert len(parts) > 1
    assert sum(len(part[0]) - 3 for part in parts) == len(head) - 3
    for part in parts:
        assert part[0][:3] == head[:3]
        assert max(map(len, markdown(part).splitlines())) <= 100
    narrow: tuple[tuple[str, ...], list[tuple[str, ...]]] = (("method", "K", "right"), [("a", "1", "2")])
    assert split_table(narrow) == [narrow]
