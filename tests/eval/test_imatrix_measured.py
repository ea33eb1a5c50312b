"""Importance matrices that we measure: against torch on the same weights, stopped and gone on with, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import torch
import transformers
from PIL import Image

import qap_gguf as qap
from qap_gguf.cli.main import main
from qap_gguf.convert import merge_imatrix, quantize
from qap_gguf.convert.output.imatrix_sums import read_sums
from qap_gguf.errors import ConvertError, DataError
from qap_gguf.eval import measure_imatrix
from qap_gguf.eval.imatrix import _Pictures
from qap_gguf.files.gguf import read_gguf
from qap_gguf.generation.messages import read_messages
from qap_gguf.language.likelihood import answer_tokens
from qap_gguf.language.llama import LanguageModel
from upstream_imatrix import with_experts

Array = npt.NDArray[Any]
#: Module of transformers -> tensors of the GGUF file that are multiplied with the same rows.
MODULES = {
    "self_attn.q_proj": ("attn_q", "attn_k", "attn_v"), "self_attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate", "ffn_up"), "mlp.down_proj": ("ffn_down",),
}  # fmt: skip
KEEP = qap.PruneConfig(n_keep=5, positions="compact")
QUESTIONS = [("a.png", "What is this?", "a cat"), ("b.png", "Where?", "here"), ("b.png", "Who is that?", None)]


@dataclass(frozen=True)
class Place:
    folder: Path
    model: Path
    mmproj: Path
    data: Path
    checkpoint: Path

    def measure(self, name: str, **settings: Any) -> Any:
        given: dict[str, Any] = {
            "model": self.model,
            "mmproj": self.mmproj,
            "prune": KEEP,
            "n_ctx": 256,
            "n_threads": 1,
        }
        return measure_imatrix(self.data, self.folder / name, **(given | settings))


@pytest.fixture(scope="module")
def place(plain_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("imatrix")
    settings: dict[str, Any] = {"mmproj_type": "f32", "keep_positions": False}
    made = qap.convert(plain_llava, folder / "m", quantize="F32", name="t", **settings)
    dice = np.random.default_rng(7)
    for name in ("a.png", "b.png"):
        Image.fromarray(dice.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / name)
    rows = [{"image": i, "question": q} | ({"answer": a} if a else {}) for i, q, a in QUESTIONS]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Place(folder, made.model, made.mmproj, data, plain_llava)


@pytest.fixture(scope="module")
def whole(place: Place) -> Any:
    """A measurement that nothing disturbed."""
    return place.measure("whole.gguf")


def torch_sums(place: Place) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums of squares and counts, (kinds, columns) and (kinds,), by hooks on transformers' modules.

    A picture's rows and what is in front of them are read once; each question and its answer anew, after them.
    """
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(place.checkpoint, dtype=torch.float32).eval()
    layers, embed = hf.model.language_model.layers, hf.get_input_embeddings()
    seen: dict[str, Array] = {}
    for number, layer in enumerate(layers):
        for name, targets in MODULES.items():

            def keep(_: Any, inputs: Any, number: int = number, targets: tuple[str, ...] = targets) -> None:
                for target in targets:
                    seen[f"blk.{number}.{target}.weight"] = inputs[0][0].double().numpy()

            layer.get_submodule(name).register_forward_pre_hook(keep)
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    last = ""
    with qap.VisionModel(place.mmproj, place.model, n_ctx=256, n_threads=1) as vlm:
        for name, question, answer in QUESTIONS:
            image = vlm.encode(place.folder / name)
            cut = vlm.prune(image, KEEP)
            turns = read_messages([{"role": "user", "content": [image, question]}])
            chunks = vlm._encoder.tokenize(vlm._template.render(turns).text, [image.size], add_special=True)
            before, after = chunks[0].tokens, chunks[2].tokens
            vlm.generate([image, question], prune=KEEP, stream=True).close()
            said = answer_tokens(LanguageModel(vlm.language_model), answer) if answer else []
            rows = image.features[cut.indices]
            parts = [embed(torch.tensor(before)), torch.tensor(rows), embed(torch.tensor(after + said))]
            with torch.no_grad():
                hf.model.language_model(inputs_embeds=torch.cat(parts)[None])
            kinds = np.array([1] * len(before) + [0] * len(rows) + [1] * len(after) + [2] * len(said))
            fresh = np.arange(len(kinds)) >= (len(before) + len(rows) if name == last else 0)
            for tensor, values in seen.items():
                for kind in range(3):
                    used = values[(kinds == kind) & fresh]
                    sums.setdefault(tensor, np.zeros((3, values.shape[1])))[kind] += (used**2).sum(axis=0)
                    counts.setdefault(tensor, np.zeros(3))[kind] += len(used)
            last = name
    return sums, counts


def difference(got: Array, want: Array) -> float:
    """Distance of two vectors in lengths of the second."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_it_is_what_torch_sees(place: Place, whole: Any) -> None:
    want, counts = torch_sums(place)
    got = read_sums(whole.path)
    assert set(got.entries) == set(want)
    found = {name: difference(sums[0], want[name].sum(axis=0)) for name, (sums, _) in got.entries.items()}
    print("relative differences from torch:", {name: f"{value:.1e}" for name, value in found.items()})
    assert max(found.values()) <= 1e-3
    assert found["blk.0.attn_q.weight"] <= 1e-6  # nothing is in front of it that rounds
    assert {name: rows.ravel().tolist() for name, (_, rows) in got.entries.items()} == {
        name: [rows.sum()] for name, rows in counts.items()
    }
    assert whole.rows == {kind: counts["blk.0.attn_q.weight"][i] for i, kind in enumerate(("image", "text", "answer"))}
    assert whole.rows["image"] == 2 * 5  # two pictures, each read once


def test_weights_are_means_of_the_kinds(place: Place, whole: Any) -> None:
    want, counts = torch_sums(place)
    place.measure("light.gguf")
    lighter = place.measure("light.gguf", weights={"image": 0.5, "answer": 3})
    assert (lighter.n_known, lighter.n_pieces) == (2, 2)  # nothing is measured again
    by = np.array([0.5, 1, 3])
    for name, (sums, rows) in read_sums(lighter.path).entries.items():
        mean = (want[name] * by[:, None]).sum(axis=0) / (counts[name] * by).sum()
        assert difference(sums[0] / rows[0], mean) <= 1e-3, name
    again = place.measure("light.gguf")
    assert again.path.read_bytes() == Path(whole.path).read_bytes()


def test_stopped_and_gone_on_with_is_the_same(place: Place, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _Pictures.read

    def stopping(self: Any, number: int) -> None:
        if number == 1:
            real(self, 0)  # half of the second piece
            raise KeyboardInterrupt
        real(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(_Pictures, "read", stopping)
        with pytest.raises(KeyboardInterrupt):
            place.measure("stopped.gguf", save_seconds=0)
    assert not (place.folder / "stopped.gguf").exists()
    rest = place.measure("stopped.gguf")
    assert (rest.n_known, rest.n_pieces) == (1, 2)
    assert rest.path.read_bytes() == Path(whole.path).read_bytes()


def test_more_pictures_go_on_from_fewer(place: Place, whole: Any) -> None:
    assert place.measure("fewer.gguf", limit=1).n_pieces == 1
    assert place.measure("fewer.gguf").n_known == 1
    assert (place.folder / "fewer.gguf").read_bytes() == Path(whole.path).read_bytes()
    with pytest.raises(DataError, match=r"at most 1 measured pieces \(limit\), got 2"):
        place.measure("fewer.gguf", limit=1)


def test_pruned_and_dense_differ_and_the_state_knows(place: Place, whole: Any) -> None:
    dense = place.measure("dense.gguf", prune=None)
    assert dense.rows["image"] == 2 * 16
    with pytest.raises(DataError, match=r"whole.gguf.state belongs to a measurement with another prune; .*--force"):
        place.measure("whole.gguf", prune=None)


def test_files_are_added_up(place: Place, whole: Any, tmp_path: Path) -> None:
    dense = place.measure("dense2.gguf", prune=None)
    merge_imatrix([whole.path, dense.path], tmp_path / "both.gguf")
    parts = [read_sums(path).entries for path in (whole.path, dense.path)]
    both = read_sums(tmp_path / "both.gguf")
    assert both.datasets == (str(place.data), str(place.data))
    for name, (sums, rows) in both.entries.items():
        assert (sums == parts[0][name][0] + parts[1][name][0]).all()
        assert rows[0, 0] == parts[0][name][1][0, 0] + parts[1][name][1][0, 0]
    with pytest.raises(ConvertError, match="expected no file"):
        merge_imatrix([whole.path, dense.path], tmp_path / "both.gguf")
    (tmp_path / "old.dat").write_bytes(b"abc")
    with pytest.raises(ConvertError, match="another kind or a damaged one"):
        merge_imatrix([whole.path, tmp_path / "old.dat"], tmp_path / "x.gguf")


def test_the_quantizer_takes_it(place: Place, whole: Any, tmp_path: Path) -> None:
    plain = quantize(place.model, tmp_path / "plain.gguf", type="Q4_0")
    minded = quantize(place.model, tmp_path / "minded.gguf", type="Q4_0", imatrix=whole.path)
    assert plain.read_bytes() != minded.read_bytes()
    keys = read_gguf(minded).metadata
    assert keys["quantize.imatrix.file"] == "whole.gguf"
    assert keys["quantize.imatrix.entries_count"] == 2 * 7
    for source, words in ((minded, "refusal"), (place.mmproj, "expected")):
        with pytest.raises(qap.QapError, match=words):
            quantize(source, tmp_path / "x.gguf", type="Q8_0")
    with pytest.raises(ConvertError, match="expected no file"):
        quantize(place.model, minded)
    with pytest.raises(ConvertError, match="got the same"):
        quantize(place.model, place.model, force=True)


def test_convert_measures_before_it_quantizes(
    make_llava: Callable[..., Path], place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(place.checkpoint), str(tmp_path / "out"), "--quantize", "Q4_0", "--name", "t"]
    assert main([*words, "--imatrix-data", str(place.data), "--n-keep", "5"]) == 0
    assert capsys.readouterr().out.split("\n")[1].endswith("t-Q4_0.gguf")
    keys = read_gguf(tmp_path / "out" / "t-Q4_0.gguf").metadata
    assert keys["quantize.imatrix.dataset"] == str(place.data)[:127]
    assert read_sums(tmp_path / "out" / "imatrix.gguf").entries.keys() >= {"blk.1.ffn_down.weight"}


def test_experts_are_counted_apart(place: Place, tmp_path: Path) -> None:
    """What a router sends to its experts is what it sees itself, once for each expert that is used."""
    model = with_experts(place.model, tmp_path / "experts.gguf", n_experts=4, n_used=2)
    found = place.measure("experts.imatrix.gguf", model=model)
    got = read_sums(found.path).entries
    for block in ("blk.0", "blk.1"):
        seen, rows = got[f"{block}.ffn_gate_inp.weight"]
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            sums, counts = got[f"{block}.{name}.weight"]
            assert sums.shape == (4, 64)
            assert counts.sum() == 2 * rows[0, 0]
            assert (counts > 0).sum() > 2
            np.testing.assert_allclose(sums.sum(axis=0), 2 * seen[0], rtol=1e-5)
    small = quantize(model, tmp_path / "q.gguf", type="Q4_0", imatrix=found.path)
    assert small.stat().st_size < model.stat().st_size / 3


def test_text_is_read_in_chunks(place: Place, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("Hello world, it has 123 words. " * 40)
    found = measure_imatrix(text, tmp_path / "t.gguf", model=place.model, text=True, chunk=64, n_ctx=64, limit=3)
    assert found.rows == {"image": 0, "text": 3 * 64, "answer": 0}
    got = read_sums(found.path)
    assert (got.n_chunks, got.chunk_size) == (3, 64)
    assert got.entries["blk.0.ffn_down.weight"][1].ravel().tolist() == [192]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{data}", "-o", "{new}", "--weight", "picture=1"], "expected one of image, text, answer, got 'picture'"),
        (["{data}", "-o", "{new}", "--weight", "image"], "expected KIND=NUMBER such as image=0.5, got 'image'"),
        (["{data}", "-o", "{new}", "--weight", "image=-1"], "expected numbers from 0 to 1e6"),
        (["{data}", "-o", "{folder}"], "expected no file"),
        (["{data}", "-o", "{folder}/no/x.gguf"], "expected a folder to write to"),
        (["{data}", "{data}", "-o", "{new}"], "expected one file of DATA, got 2"),
        (["none.jsonl", "-o", "{new}"], "cannot open none.jsonl"),
        (["{data}", "-o", "{new}", "--text"], "--text needs -m/--model"),
        (["{data}", "-o", "{new}", "--merge"], "expected at least two files to merge, got 1"),
        (["{data}", "-o", "{new}", "-m", "{model}", "--mmproj", "{mmproj}", "--n-keep", "99", "--ctx", "16"], "n_ctx"),
        (["{data}", "-o", "{new}", "-m", "{model}", "--text", "--ctx", "600"], "a text of 512 tokens or more, got"),
    ],
)
def test_what_is_wrong_is_one_line(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    names = {
        "data": place.data, "new": tmp_path / "x.gguf", "folder": tmp_path, "model": place.model, "mmproj": place.mmproj
    }  # fmt: skip
    assert main(["imatrix", *(word.format(**names) for word in words)]) in (1, 2)
    err = capsys.readouterr().err
    assert said in " ".join(err.split()), err
    assert not (tmp_path / "x.gguf").exists()
