"""The file that carries a text tower: what is in it, that others pass over it, and what damaged ones say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

import qap_gguf as qap
from clip_text.clip_checkpoint import hidden_states, nmse
from dropin.children import python
from dropin.gguf_copy import rewrite
from qap_gguf import _core
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.pruning.clip_text import ClipTextTower

if TYPE_CHECKING:
    from clip_text.conftest import Clip

EMBED = """
import sys
from dropin.probe import Mtmd, digest, packaged
mtmd = Mtmd(sys.argv[1], sys.argv[2], flash=False)
(chunk,) = mtmd.tokenize(packaged()[2])
print("DIGEST", digest(mtmd.embeddings(chunk)), "qap_gguf" in sys.modules)
"""


def digest_by_stock(mmproj: Path, model: Path) -> str:
    """Embeddings of the packaged picture, by the stock libmtmd in a child that never imports qap_gguf."""
    done = python(EMBED, mmproj, model, env={"PYTHONPATH": str(Path(__file__).resolve().parents[1])})
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("DIGEST")]
    assert line.endswith("False")
    return line


def test_the_stock_library_passes_over_the_tower(clip: Clip, plain_llava: Path, tmp_path: Path) -> None:
    plain = qap.convert(plain_llava, tmp_path, quantize="F32", mmproj_type="f32", keep_positions=False)
    assert digest_by_stock(clip.mmproj, clip.model) == digest_by_stock(plain.mmproj, plain.model)


def test_what_the_file_holds(clip: Clip) -> None:
    reader, case = gguf.GGUFReader(clip.mmproj), clip.case
    got = {k: f.contents() for k, f in reader.fields.items() if k.startswith("qap_clip_text.")}
    names = {t.name: t for t in reader.tensors if t.name.startswith("qap_clip_text.")}
    assert not [k for k in reader.fields if k.startswith("qap.")]
    tokens, merges = got.pop("qap_clip_text.tokenizer.tokens"), got.pop("qap_clip_text.tokenizer.merges")
    eos, bos = clip.tokenizer.eos_token_id, clip.tokenizer.bos_token_id
    assert {key.removeprefix("qap_clip_text."): value for key, value in got.items()} == {
        "version": 1, "block_count": case.n_layer, "attention.head_count": case.n_head,
        "attention.layer_norm_epsilon": pytest.approx(1e-5), "embedding_length": case.n_embd,
        "feed_forward_length": case.n_ff, "context_length": case.n_ctx, "projection_length": case.n_proj,
        "vocab_size": len(clip.tokenizer) + 3, "activation": case.activation,
        "eos_token_id": 2 if case.old_files else 1,
        "vision.embedding_length": 32, "vision.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.bos_token_id": bos, "tokenizer.eos_token_id": eos, "tokenizer.pad_token_id": eos,
        "tokenizer.unknown_token_id": eos, "tokenizer.special_token_ids": sorted([bos, eos]),
    }  # fmt: skip
    assert len(names) == 8 + 16 * case.n_layer
    assert tokens[eos] == "<|endoftext|>"
    assert len(tokens) == len(clip.tokenizer)
    assert all(len(merge.split(" ")) == 2 for merge in merges)
    np.testing.assert_array_equal(names["qap_clip_text.text_proj.weight"].data, clip.hf.text_projection.weight.detach())


def test_f16_weights_stay_near(clip: Clip, plain_llava: Path, tmp_path: Path) -> None:
    files = qap.convert(plain_llava, tmp_path, quantize="F16", mmproj_type="f16", clip_text=clip.folder)
    tower, hidden = ClipTextTower.open(files.mmproj), hidden_states()
    assert tower is not None
    with tower:
        assert nmse(tower.embed("a photo of a cat"), clip.tower.embed("a photo of a cat")) <= 1e-4
        assert nmse(tower.relevance(hidden, "a cat"), clip.tower.relevance(hidden, "a cat")) <= 1e-4
    small, large = files.mmproj.stat().st_size, clip.mmproj.stat().st_size
    assert small < large


def test_prune_defaults_and_the_tower_share_a_file(clip: Clip, plain_llava: Path, tmp_path: Path) -> None:
    cfg = qap.PruneConfig(n_keep=5, alpha=0.25)
    files = qap.convert(plain_llava, tmp_path, quantize="F32", clip_text=clip.folder, prune=cfg)
    with qap.VisionModel(files.mmproj, files.model, n_ctx=256) as vlm:
        assert vlm.encode(np.zeros((28, 28, 3), "u1")).n_tokens == 16
    tower = ClipTextTower.open(files.mmproj)
    assert tower is not None
    tower.close()


def test_a_merge_of_unknown_tokens_is_named(clip: Clip, tmp_path: Path) -> None:
    merges: Any = (["no-such such-no"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    path = rewrite(clip.mmproj, tmp_path / "x.gguf", {"qap_clip_text.tokenizer.merges": merges})
    with pytest.raises(ModelFileError, match="merges of known tokens") as caught:
        ClipTextTower.open(path)
    assert "\n" not in str(caught.value)


def test_without_the_package_one_line_says_how_to_install_it(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tower = ClipTextTower.open(clip.mmproj, n_threads=1)
    assert tower is not None
    with tower:
        assert tower.project(hidden_states(2)).shape == (2, clip.case.n_proj)  # what needs no prompt goes on
        with pytest.raises(ConfigError, match=r"pip install 'qap_gguf\[clip-text\]'") as caught:
            tower.embed("a cat")
    assert "\n" not in str(caught.value)


def test_native_code_refuses_ids_outside_the_vocabulary(clip: Clip) -> None:
    native = _core.ClipText(str(clip.mmproj), None, 1)
    for ids in ([], [0] * (native.n_ctx + 1), [-1], [native.n_vocab]):
        with pytest.raises(ValueError, match="ids: expected"):
            native.embed(ids)


def test_a_file_without_a_tower_gives_none() -> None:
    assert ClipTextTower.open(qap.packaged_model().mmproj) is None


def test_a_device_by_name(clip: Clip) -> None:
    tower = ClipTextTower.open(clip.mmproj, device="cpu", n_threads=1)
    assert tower is not None
    with tower:
        np.testing.assert_allclose(tower.embed("cat"), clip.tower.embed("cat"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="device: expected one of"):
        ClipTextTower.open(clip.mmproj, device="quantum")


WRONG_KEYS: dict[str, tuple[Any, str]] = {
    "version": (2, "version"),
    "block_count": (9, "blk"),
    "attention.head_count": (5, "heads share"),
    "embedding_length": (60, "shape"),
    "feed_forward_length": (0, "feed_forward_length"),
    "context_length": (7, "shape"),
    "projection_length": (2**31, "projection_length"),
    "vocab_size": (50, "shape"),
    "activation": ("relu", "activation"),
    "eos_token_id": (10**6, "eos_token_id"),
    "vision.embedding_length": (33, "shape"),
    "vision.layer_norm_epsilon": (float("nan"), "epsilon"),
    "attention.layer_norm_epsilon": (1, "type f32"),
    "tokenizer.bos_token_id": (10**5, "bos_token_id"),
    "tokenizer.unknown_token_id": (None, "found none"),
    "tokenizer.tokens": (([1, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32), "array of str"),
    "tokenizer.special_token_ids": (([-1], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32), "special token"),
    "tokenizer.eos_token_id": (1.5, "eos_token_id"),
    "tokenizer.merges": ((["a b", "no"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING), "merge"),
}


@pytest.mark.parametrize("key", list(WRONG_KEYS))
def test_a_key_that_is_wrong_is_named(clip: Clip, tmp_path: Path, key: str) -> None:
    value, words = WRONG_KEYS[key]
    path = rewrite(clip.mmproj, tmp_path / "x.gguf", {f"qap_clip_text.{key}": value})
    with pytest.raises(ModelFileError, match=words) as caught:
        ClipTextTower.open(path)
    assert "\n" not in str(caught.value)
    assert "--clip-text" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("blk.1.ffn_up.weight", None, "found none"),
        ("final_ln.bias", np.zeros(3, "f4"), "shape"),
        ("text_proj.weight", np.zeros((2, 2), "f4"), "shape"),
        ("post_ln.weight", np.ones(32, "f2"), "f32"),
        ("token_embd.weight", np.zeros((5, 5), "i4"), "shape"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(clip: Clip, tmp_path: Path, name: str, array: Any, words: str) -> None:
    path = rewrite(clip.mmproj, tmp_path / "x.gguf", tensors={f"qap_clip_text.{name}": array})
    with pytest.raises(ModelFileError, match=words) as caught:
        ClipTextTower.open(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_cut_or_missing(clip: Clip, tmp_path: Path) -> None:
    whole, short = clip.mmproj.read_bytes(), tmp_path / "short.gguf"
    for size in (0, 100, len(whole) // 3, len(whole) - 1):
        short.write_bytes(whole[:size])
        with pytest.raises(ModelFileError) as caught:
            ClipTextTower.open(short)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="cannot open"):
        ClipTextTower.open(tmp_path / "none.gguf")


def test_weights_that_are_not_finite_are_no_relevance(clip: Clip, tmp_path: Path) -> None:
    bad = np.full(clip.case.n_embd, np.nan, "f4")
    path = rewrite(clip.mmproj, tmp_path / "x.gguf", tensors={"qap_clip_text.final_ln.bias": bad})
    tower = ClipTextTower.open(path)
    assert tower is not None
    with tower, pytest.raises(qap.QapError, match="damaged"):
        tower.relevance(hidden_states(), "cat")


def test_the_command_takes_the_folder(
    clip: Clip, plain_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qap_gguf.cli import main

    words = ["convert", str(plain_llava), str(tmp_path), "--quantize", "F16", "--clip-text", str(clip.folder), "--json"]
    assert main(words) == 0
    tower = ClipTextTower.open(json.loads(capsys.readouterr().out)["mmproj"])
    assert tower is not None
    tower.close()
