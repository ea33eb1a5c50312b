"""`convert`, `info`, `eval`, and the help of all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import qap_gguf
from qap_gguf.cli import common, info, main, output, progress
from qap_gguf.config import PruneConfig
from qap_gguf.convert import ConvertResult
from qap_gguf.errors import ConvertError

#: The folder that this qap_gguf was imported from.
SOURCE = Path(next(iter(qap_gguf.__path__))).parent

Said = pytest.CaptureFixture[str]


# --- convert, info, eval ----------------------------------------------------------------------------------------------


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def fake(src: Path, out: Path, **kwargs: Any) -> Any:
        calls.append({"src": src, "out": out} | kwargs)
        if kwargs["progress"] is not None:
            kwargs["progress"](1, 2, "blk.0")
        if out.name == "full":
            raise ConvertError("out/model.gguf is there; say --force")
        return ConvertResult(out / "mmproj-f16.gguf", out / "x-Q4_0.gguf", notes=("a note",))

    monkeypatch.setattr(qap_gguf, "convert", fake, raising=False)
    return calls


def test_convert_prints_the_two_paths(converted: list[dict[str, Any]], capsys: Said) -> None:
    assert main(["convert", "in", "out", "--quantize", "Q4_0", "--mmproj-type", "f32", "--name", "x", "--force"]) == 0
    assert capsys.readouterr() == ("out/mmproj-f16.gguf\nout/x-Q4_0.gguf\n", "a note\n")
    assert converted == [
        {
            "src": Path("in"), "out": Path("out"), "quantize": "Q4_0", "mmproj_type": "f32", "name": "x",
            "prune": None, "vision_tower": None, "clip_text": None, "imatrix": None,
            "keep_positions": None, "force": True, "progress": None,
        }
    ]  # fmt: skip


def test_convert_stores_prune_options_only_if_one_was_given(converted: list[dict[str, Any]], capsys: Said) -> None:
    assert main(["convert", "in", "out", "--alpha", "dynamic", "--n-keep", "64", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["mmproj"], got["model"]) == ("out/mmproj-f16.gguf", "out/x-Q4_0.gguf")
    assert (got["metadata"]["qap.n_keep"], got["metadata"]["qap.alpha_dynamic"]) == (64, True)
    assert converted[0]["prune"] == PruneConfig(n_keep=64, alpha="dynamic")
    assert converted[0]["force"] is False
    assert main(["convert", "in", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] is None


def test_a_failed_conversion_prints_no_path(converted: list[dict[str, Any]], capsys: Said) -> None:
    assert main(["convert", "in", "full"]) == 1
    assert capsys.readouterr() == ("", "qap-gguf: error: out/model.gguf is there; say --force\n")


@pytest.mark.parametrize("bar", [progress.progress_bar, partial(output.counter_bar, "questions")])
def test_progress_bars_are_for_terminals_and_go_to_stderr(
    bar: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    with bar() as report:
        assert report is None
    for module in (progress, output):
        monkeypatch.setattr(module, "on_terminal", lambda: True)
    with bar() as report:
        report(1, 2, "x")
    assert capsys.readouterr().out == ""


def test_info_is_text_or_json(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    facts = {"version": "0.1", "pin": {"ok": True, "expected": "0.3"}, "devices": [{"name": "CPU"}], "none": None}
    monkeypatch.setattr(qap_gguf, "info", lambda: facts, raising=False)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["version", "0.1"], ["pin.ok", "yes"], ["pin.expected", "0.3"], ["devices.0.name", "CPU"], ["none", "-"],
    ]  # fmt: skip
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert list(info.flatten([])) == [("", "-")]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    rows = []
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
        rows += [
            {"image": f"{i}.png", "question": q, "answer": a, "kind": "at"} for q, a in (("?", "A dog"), ("!", "x"))
        ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "q.jsonl")


def test_eval_prints_markdown_in_a_pipe(fake: Any, questions: str, capsys: Said) -> None:
    assert main(["eval", questions, "--n-keep", "18", "--n-keep", "36", "--methods", "dense, qap,random"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    first_words = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert first_words == ["method", ":-------", "dense", "qap", "random", "qap", "random"] * 3
    assert any("3/6 |" in line and " 50.0 |" in line for line in lines)
    assert "bootstrap over pictures" in said.out
    assert len(fake.only().encoded) == 3
    assert len(fake.only().calls) == 6 * (1 + 2)  # this model keeps the same tokens by every method: asked once
    assert fake.only().closed


def test_eval_json_and_the_settings_of_the_base(questions: str, capsys: Said) -> None:
    words = ["--json", "--limit", "2", "--group-size", "32", "--alpha", "0.3", "--seed", "5", "--methods", "qap,random"]
    assert main(["eval", questions, *words]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["n_questions"], got["n_pictures"], got["interval"]["seed"]) == (2, 1, 5)
    qap, random = got["results"]
    assert (qap["configs"][0]["alpha"], qap["configs"][0]["group_size"], qap["keep_ratio"]) == (0.3, 32, 0.25)
    assert [config["seed"] for config in random["configs"]] == [5, 6, 7]
    assert (qap["n_kept"], qap["n_right"], qap["n_total"], qap["low"]) == (36.0, 1.0, 2, None)


def test_eval_says_what_is_wrong_with_the_data(fake: Any, tmp_path: Path, capsys: Said) -> None:
    assert main(["eval", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("qap-gguf: error: ")
    assert fake.opened == []


def test_tables_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "80")
    output.print_table((("method", "K"), [("qap", "18")]))
    assert "method" in out.getvalue()
    assert "|:--" not in out.getvalue()


# --- help, and the command as a process -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "convert", "eval", "bench", "info"])
def test_help_has_an_example(command: str, capsys: Said) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"qap-gguf {command} " in text.split("Example", 1)[1]


def test_the_prune_options_are_the_same_words_everywhere(capsys: Said) -> None:
    shared = [name for name in common._PRUNE if name not in ("seed", "dense", "select")]
    for command in ("run", "compare", "convert", "eval", "bench"):
        assert main([command, "-h"]) == 0
        text = capsys.readouterr().out
        assert all("--" + name.replace("_", "-") in text for name in shared)
    fields = set(PruneConfig().to_dict())
    assert set(common._PRUNE) - {"dense"} == fields


def test_every_command_that_opens_a_model_has_the_same_options(capsys: Said) -> None:
    for command in ("run", "compare", "score", "eval", "bench", "serve"):
        assert main([command, "-h"]) == 0
        text = capsys.readouterr().out
        assert all(f"--{name}" in text for name in ("kv", "max-image-tokens", "ctx", "threads", "model-device"))


def test_version_and_help_of_the_group(capsys: Said) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qap-gguf")
    assert main(["--help"]) == 0
    assert "convert" in capsys.readouterr().out


def test_help_does_not_load_what_it_does_not_need() -> None:
    code = (
        "import sys; from qap_gguf.cli import main; assert main(['eval', '--help']) == 0; "
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules), sorted(sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
