"""`score` with the packaged model: the table, JSON, the files, and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qap_gguf as qap
from qap_gguf.cli import main
from qap_gguf.cli.score import HEAD
from qap_gguf.errors import ConfigError

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

Said = pytest.CaptureFixture[str]
SCORES = ("error", "outlier", "sensitivity", "semantic", "total")


@pytest.fixture(autouse=True)
def fake() -> None:
    """Take the place of the fixture of that name: these tests want the real model."""


@pytest.fixture(scope="module")
def sample() -> str:
    return str(qap.packaged_model().sample)


@pytest.fixture(scope="module")
def truth(sample: str) -> tuple[qap.ImageEmbedding, qap.PrunedImage]:
    with qap.VisionModel() as vlm:
        image = vlm.encode(sample)
        return image, vlm.prune(image, qap.PruneConfig(n_keep=36))


# --- the table and JSON -----------------------------------------------------------------------------------------------


def test_the_table_has_the_highest_totals(truth: Any, sample: str, capsys: Said) -> None:
    _, cut = truth
    assert main(["score", sample, "--n-keep", "36", "--top", "40"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert tuple(lines[0].split()) == HEAD
    assert lines[-1] == "kept 36 of 144 tokens (25.0 %), alpha 0.7"
    rows = [line.split() for line in lines[1:-2]]
    tokens = [int(row[0]) for row in rows]
    assert tokens == np.argsort(-cut.scores.total, kind="stable")[:40].tolist()
    kept = set(cut.indices.tolist())
    assert [row[-1] for row in rows] == ["yes" if token in kept else "no" for token in tokens]
    assert 0 < sum(token in kept for token in tokens[:36]) < 36  # dpp leaves out what resembles better tokens
    for token, row in zip(tokens, rows, strict=True):
        assert (int(row[1]) - 1, int(row[2]) - 1) == divmod(token, 12)  # people count from 1
        for name, word in zip(HEAD[3:8], row[3:8], strict=True):
            assert float(word) == pytest.approx(float(getattr(cut.scores, name)[token]), rel=6e-4, abs=6e-5)
    assert len({len(line) for line in lines[:-2]}) == 1  # aligned


def test_without_words_the_sample_and_twenty_rows(sample: str, capsys: Said) -> None:
    assert main(["score", "--semantic", "none"]) == 0
    said = capsys.readouterr()
    assert said.err == f"no IMAGE, so this is about the packaged sample {sample}\n"
    lines = said.out.splitlines()
    assert len(lines) == 1 + 20 + 2
    assert [line.split()[5] for line in lines[1:21]] == ["-"] * 20
    assert lines[-1] == "kept 36 of 144 tokens (25.0 %), alpha 0.7"


def test_json_has_everything(truth: Any, sample: str, capsys: Said) -> None:
    image, cut = truth
    assert main(["score", sample, "--n-keep", "36", "--json"]) == 0
    said = capsys.readouterr()
    got = json.loads(said.out)
    assert said.err == ""
    assert (got["image"], got["npz"], got["png"]) == (sample, None, None)
    assert (got["n_tokens"], got["n_keep"], got["grid"], got["size"]) == (144, 36, [12, 12], [192, 192])
    assert got["config"] == qap.PruneConfig(n_keep=36).to_dict()
    assert got["indices"] == cut.indices.tolist()
    assert got["positions"] == got["indices"]  # the packaged model keeps places
    assert np.array(got["attention"], np.float32).tolist() == image.attention.tolist()
    assert set(got["scores"]) == set(SCORES)
    for name in SCORES:
        np.testing.assert_array_equal(np.array(got["scores"][name], np.float32), getattr(cut.scores, name))
    assert set(got["seconds"]) == {"encode", "score", "select"}


def test_the_table_is_drawn_on_a_terminal(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "30")
    assert main(["score", sample, "--top", "2"]) == 0
    assert "sensitivity" in out.getvalue()
    assert "\u2500\u2500" in out.getvalue()


def test_the_defaults_of_the_file_come_before_ours(sample: str, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    stored = qap.PruneConfig(n_keep=9, alpha=0.25)
    monkeypatch.setattr(qap.VisionModel, "file_config", property(lambda _: stored))
    assert main(["score", sample, "--json", "--seed", "7", "--select", "random"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == stored.replace(seed=7, select="random").to_dict()
    assert main(["score", sample, "--json", "--keep-ratio", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["n_keep"] == 72


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [False, True])
def test_npz_holds_what_prune_gives(features: bool, truth: Any, sample: str, tmp_path: Path, capsys: Said) -> None:
    image, cut = truth
    out = tmp_path / "scores.npz"
    assert main(["score", sample, "--n-keep", "36", "--npz", str(out), *["--features"] * features]) == 0
    assert capsys.readouterr().err == f"wrote {out}\n"
    with np.load(out) as got:
        expected = {name: getattr(cut.scores, name) for name in SCORES}
        expected |= {"indices": cut.indices, "positions": cut.positions, "attention": image.attention}
        expected |= {"padding": np.zeros(144, np.bool_), "dropped_early": np.zeros(144, np.bool_)}
        expected |= {"grid": np.array([12, 12], np.int32), "alpha": np.float32(0.7)}
        if features:
            expected["features"] = image.features
        assert set(got.files) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value)
            assert got[name].dtype == value.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_png_is_the_plot(truth: Any, sample: str, tmp_path: Path, capsys: Said) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    from qap_gguf.plotting.plot import plot

    image, cut = truth
    out = tmp_path / "kept.PNG"
    assert main(["score", sample, "--n-keep", "36", "--png", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["png"] == str(out)
    expected = plot(sample, image, cut.scores, cut.indices, cfg=qap.PruneConfig(n_keep=36), title="sample.png")
    with Image.open(out) as got:
        assert got.format == "PNG"
        assert got.convert("RGB").tobytes() == expected.tobytes()


def test_files_are_overwritten_only_by_force(sample: str, tmp_path: Path, capsys: Said) -> None:
    out = tmp_path / "scores.npz"
    out.write_text("precious")
    assert main(["score", sample, "--npz", str(out)]) == 1
    assert capsys.readouterr() == (
        "", f"qap-gguf: error: --npz: expected no file {out}, found one; give --force to overwrite it\n",
    )  # fmt: skip
    assert out.read_text() == "precious"
    assert main(["score", sample, "--npz", str(out), "--force"]) == 0
    with np.load(out) as got:
        assert len(got["indices"]) == 36


def test_a_file_that_comes_meanwhile_stays(sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, savez = tmp_path / "scores.npz", np.savez

    def slow(file: Any, **arrays: Any) -> None:
        savez(file, **arrays)
        out.write_text("precious")

    monkeypatch.setattr(np, "savez", slow)
    assert main(["score", sample, "--npz", str(out)]) == 1
    assert out.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


@pytest.mark.parametrize(("err", "status"), [(KeyboardInterrupt(), 130), (OSError("disk full"), 1)])
def test_nothing_half_written_stays(
    err: BaseException, status: int, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: Any, **_arrays: Any) -> None:
        file.write(b"half")
        raise err

    monkeypatch.setattr(np, "savez", broken)
    assert main(["score", sample, "--npz", str(tmp_path / "scores.npz")]) == status
    assert list(tmp_path.iterdir()) == []


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--features"],
        ["--npz", "scores.txt"],
        ["--png", "kept.jpg"],
        ["--top", "0"],
        ["--dense"],
        ["--alpha", "2"],
        ["--n-keep", "3", "--keep-ratio", "0.5"],
        ["-m", "model.gguf"],
    ],
)
def test_wrong_usage_is_exit_2(words: list[str], sample: str, capsys: Said) -> None:
    assert main(["score", sample, *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Error: " in said.err


@pytest.mark.parametrize("kind", ["none", "text", "folder"])
def test_a_bad_picture_is_one_line(kind: str, tmp_path: Path, capsys: Said) -> None:
    bad = tmp_path if kind == "folder" else tmp_path / "bad.png"
    if kind == "text":
        bad.write_text("no picture")
    assert main(["score", str(bad)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("qap-gguf: error: image: ")
    assert said.err.count("\n") == 1


def test_other_errors_are_one_line(sample: str, tmp_path: Path, capsys: Said) -> None:
    words = {"--npz": ["--npz", str(tmp_path / "no" / "x.npz")]}
    words["--png"] = ["--png", str(tmp_path / "folder.png")]
    (tmp_path / "folder.png").mkdir()
    for name, given in words.items():
        assert main(["score", sample, *given]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("qap-gguf: error: ")
        assert name in said.err
        assert said.err.count("\n") == 1


def test_without_matplotlib_it_says_so_before_any_work(
    sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise ConfigError("the model was opened")

    monkeypatch.setattr(qap, "VisionModel", opened)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    assert main(["score", sample, "--png", str(tmp_path / "x.png")]) == 1
    said = capsys.readouterr()
    assert "pip install matplotlib" in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_loads_only_to_draw() -> None:
    code = (
        "import sys; from qap_gguf.cli import main; assert main(['score', '--top', '1']) == 0; "
        "assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_is_for_strangers(capsys: Said) -> None:
    assert main(["score", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("[IMAGE]", "Example", "qap-gguf score photo.jpg", "--npz", "--png", "--force", "--top", *HEAD[3:8]):
        assert word in text
    assert "--dense" not in text


def test_an_early_drop_is_told(sample: str, tmp_path: Path, capsys: Said) -> None:
    out = tmp_path / "scores.npz"
    words = ["score", sample, "--n-keep", "36", "--encoder-keep", "0.5", "--encoder-layer", "2"]
    assert main([*words, "--npz", str(out), "--top", "144"]) == 0
    said = capsys.readouterr().out
    assert "kept 36 of 144 tokens (25.0 %), 72 were dropped early, alpha 0.7" in said
    assert len(said.split("\n\n")[0].splitlines()) == 1 + 72  # the head, and those that have scores
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["dropped_early"]) == 72
    assert not set(found["dropped_early"]) & set(found["indices"])
    with np.load(out) as arrays:
        assert arrays["dropped_early"].nonzero()[0].tolist() == found["dropped_early"]
    assert main(["score", sample, "--encoder-keep", "1.5"]) == 2
    assert "encoder_keep must be a number in (0, 1], got 1.5" in capsys.readouterr().err
