"""`relabel`: the same model under the name of an architecture with M-RoPE, and the original's bytes back."""

from __future__ import annotations

import hashlib
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qap_gguf as qap
from convert.gguf_files import boolean, build, f32, take_apart, tensor, text, u32
from convert.test_annotate import names, values
from positions.language_files import SHAPES, language_file, language_keys, language_tensors, logits, nmse
from qap_gguf.convert.output.quantize import quantize_file
from qap_gguf.convert.relabel import relabel
from qap_gguf.convert.relabel.rows import halves, pairs
from qap_gguf.errors import ConvertError, ModelFileError

IDS = [1, *(int(i) for i in np.random.default_rng(7).integers(3, 320, 120))]
API = importlib.import_module("qap_gguf.convert.relabel.api")
F32_LIMIT = 1e-10
QUANTIZED_LIMIT = 1e-9
#: their kernels take rows in blocks, and a row that moved to another block is summed in another order
ROUNDED_LIMIT = dict.fromkeys(("F16", "BF16"), 1e-5)
#: the same where ggml reorders their weights for the CPU (Q4_0: with AVX-512)
REPACKED_LIMIT = dict.fromkeys(("Q4_0", "IQ4_NL"), 1e-5)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@given(
    n_heads=st.integers(1, 5), half=st.integers(1, 9), row=st.integers(1, 7), seed=st.integers(0, 9),
)  # fmt: skip
def test_rows_go_there_and_back(n_heads: int, half: int, row: int, seed: int) -> None:
    n_rows = n_heads * 2 * half
    data = np.random.default_rng(seed).integers(0, 256, n_rows * row, dtype=np.uint8)
    turned = halves(data.tobytes(), 2 * half, n_rows)
    assert pairs(turned, 2 * half, n_rows) == data.tobytes()
    got = np.frombuffer(turned, np.uint8).reshape(n_heads, 2, half, row)
    for j in range(half):  # row j of the first half was row 2j, of the second 2j + 1
        whole = data.reshape(n_heads, 2 * half, row)
        assert (got[:, 0, j] == whole[:, 2 * j]).all()
        assert (got[:, 1, j] == whole[:, 2 * j + 1]).all()


@pytest.mark.parametrize("name", list(SHAPES))
def test_logits_of_every_shape_are_equal_and_undo_gives_the_bytes_back(name: str, tmp_path: Path) -> None:
    model = language_file(tmp_path / "model.gguf", name)
    new = relabel(model, tmp_path / "new.gguf")
    want, got = logits(model, IDS), logits(new, IDS)
    print(f"\n{name}: NMSE {nmse(got, want):.1e}")
    assert nmse(got, want) <= F32_LIMIT
    assert (got.argmax(1) == want.argmax(1)).all()
    assert digest(relabel(new, tmp_path / "old.gguf", undo=True)) == digest(model)


def test_without_the_order_of_rows_logits_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(API, "halves", lambda data, *_: data)
    model = language_file(tmp_path / "model.gguf")
    assert nmse(logits(relabel(model, tmp_path / "new.gguf"), IDS), logits(model, IDS)) > 1e-3


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K_M", "IQ4_NL", "BF16"])
def test_quantized_files_are_not_requantized(kind: str, tmp_path: Path) -> None:
    plain, model = language_file(tmp_path / "plain.gguf"), tmp_path / "model.gguf"
    quantize_file(plain, model, kind)
    new = relabel(model, tmp_path / "new.gguf")
    for repack, limit in ((True, REPACKED_LIMIT.get(kind)), (False, None)):
        want, got = logits(model, IDS, repack=repack), logits(new, IDS, repack=repack)
        print(f"\n{kind}{', repacked' * repack}: NMSE {nmse(got, want):.1e}")
        assert nmse(got, want) <= (limit or ROUNDED_LIMIT.get(kind, QUANTIZED_LIMIT))
    before = {t.name: t for t in gguf.GGUFReader(model).tensors}
    for found in gguf.GGUFReader(new).tensors:
        same = sorted(map(bytes, found.data)) == sorted(map(bytes, before[found.name].data))
        assert found.tensor_type == before[found.name].tensor_type
        assert same
    assert digest(relabel(new, tmp_path / "old.gguf", undo=True)) == digest(model)


def test_a_relabelled_file_can_be_quantized(tmp_path: Path) -> None:
    model = language_file(tmp_path / "plain.gguf")
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    quantize_file(model, first, "Q8_0")
    quantize_file(relabel(model, tmp_path / "new.gguf"), second, "Q8_0")
    assert nmse(logits(second, IDS), logits(first, IDS)) <= QUANTIZED_LIMIT
    with pytest.raises(ConvertError, match="was changed after it was relabelled"):
        relabel(second, tmp_path / "old.gguf", undo=True)
    assert not (tmp_path / "old.gguf").exists()


@settings(max_examples=25, deadline=None)
@given(
    more=st.lists(st.tuples(names, values()), max_size=6, unique_by=lambda key: key[0]),
    name=st.sampled_from(["llama", "qwen2", "qwen3", "llama with biases"]),
    alignment=st.sampled_from([32, 64, 128]),
)
def test_other_keys_keep_their_bytes_and_order(
    tmp_path_factory: pytest.TempPathFactory, more: list[tuple[str, bytes]], name: str, alignment: int
) -> None:
    arch = SHAPES[name][0]
    more = [(f"x.{key}", value) for key, value in more]
    folder = tmp_path_factory.mktemp("keys")
    model = language_file(folder / "model.gguf", name, more, alignment)
    new = relabel(model, folder / "new.gguf")
    target = {"qwen3": "qwen3vl"}.get(arch, "paddleocr")
    want = [(key.replace(f"{arch}.", f"{target}.") if key.startswith(f"{arch}.") else key, value)
            for key, value in take_apart(model).keys]  # fmt: skip
    want[0] = ("general.architecture", text(target))
    found = take_apart(new).keys
    assert found[: len(want)] == want
    assert [key for key, _ in found[len(want) :]] == [
        f"{target}.rope.dimension_sections", "qap.origin.architecture", "qap.origin.sha256",
    ]  # fmt: skip
    assert dict(found)["qap.origin.sha256"] == text(digest(model))
    assert digest(relabel(new, folder / "old.gguf", undo=True)) == digest(model)
    shutil.rmtree(folder)


REFUSED: dict[str, tuple[str, list[tuple[str, bytes]], str]] = {
    "a key of its own": ("llama", [("llama.attention.scale", f32(0.5))], "llama.attention.scale, which paddleocr"),
    "scores capped": ("qwen2", [("qwen2.attn_logit_softcapping", f32(30.0))], "attn_logit_softcapping"),
    "long rope": ("llama", [("llama.rope.scaling.type", text("longrope"))], "scaled by longrope"),
    "not causal": ("qwen3", [("qwen3.attention.causal", boolean(False))], "attention.causal, which qwen3vl"),
    "already": ("llama", [("paddleocr.block_count", u32(1))], "remove that key"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_the_other_architecture_would_compute_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    shape, more, said = REFUSED[name]
    model = language_file(tmp_path / "model.gguf", shape, more)
    with pytest.raises(ConvertError, match=said) as caught:
        relabel(model, tmp_path / "new.gguf")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def renamed(tmp_path: Path, old: bytes, new: bytes) -> Path:
    """A model with other words of the same length."""
    path = language_file(tmp_path / "model.gguf")
    raw = path.read_bytes()
    assert len(old) == len(new)
    assert old in raw
    end = len(raw) if b"." in old else raw.index(b"tokenizer")  # whose model is called llama too
    path.write_bytes(raw[:end].replace(old, new) + raw[end:])
    return path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"blk.1.ffn_norm.weight", b"blk.1.rope_freqs.weig", "a whole|rope_freqs"),
        (b"blk.2.attn_output.weight", b"blk.2.attn_qkvput.weight", "which paddleocr does not have"),
        (b"llama", b"gemma", "gemma with attention in sliding windows"),
        (b"llama", b"olmo2", "the architecture olmo2, of which"),
    ],
)
def test_other_tensors_and_architectures_are_refused(old: bytes, new: bytes, said: str, tmp_path: Path) -> None:
    model = renamed(tmp_path, old, new)
    with pytest.raises((ConvertError, ModelFileError), match=said):
        relabel(model, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rope_freqs.weight", "got Llama 3's factors of its rotary frequencies"),
        ("rope_factors_long.weight", "got LongRoPE's factors"),
        ("blk.0.ffn_gate_exps.weight", "got a mixture of experts"),
        ("blk.0.attn_qkv.weight", "got q, k and v in one tensor"),
        ("output.bias", "got the tensor output.bias, which paddleocr does not have"),
    ],
)
def test_tensors_that_no_such_architecture_has_are_refused_with_the_reason(
    name: str, said: str, tmp_path: Path
) -> None:
    model = build(tmp_path / "model.gguf", language_keys("llama", {}), [*language_tensors({}), tensor(name, 8)])
    with pytest.raises(ConvertError, match=said):
        relabel(model, tmp_path / "new.gguf")


def test_an_mmproj_a_relabelled_file_and_a_plain_one_to_undo(plain_model: Path, tmp_path: Path) -> None:
    files = qap.packaged_model()
    with pytest.raises(ModelFileError, match="expected a language model, got an mmproj"):
        relabel(files.mmproj, tmp_path / "new.gguf")
    new = relabel(plain_model, tmp_path / "new.gguf")
    with pytest.raises(ConvertError, match="relabelled already"):
        relabel(files.model, tmp_path / "twice.gguf")
    with pytest.raises(ConvertError, match="nothing to undo"):
        relabel(plain_model, tmp_path / "old.gguf", undo=True)
    with pytest.raises(ConvertError, match="expected no file"):
        relabel(plain_model, new)
    assert digest(relabel(new, new, undo=True, force=True)) == digest(plain_model)


@pytest.mark.parametrize("end", [0, 3, 100, 20_000, -1])
def test_a_file_that_was_cut_short_is_one_line(end: int, tmp_path: Path) -> None:
    model = language_file(tmp_path / "model.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:end])
    with pytest.raises(ModelFileError) as caught:
        relabel(cut, tmp_path / "new.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new.gguf").exists()


@pytest.mark.parametrize("byte", [b"sha256", b"rope.dimension_sections"])
def test_a_damaged_relabelled_file_is_one_line(byte: bytes, tmp_path: Path) -> None:
    new = relabel(language_file(tmp_path / "model.gguf"), tmp_path / "new.gguf")
    raw = new.read_bytes()
    new.write_bytes(raw.replace(byte, b"x" * len(byte)))
    with pytest.raises((ConvertError, ModelFileError)) as caught:
        relabel(new, tmp_path / "old.gguf", undo=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "old.gguf").exists()


def test_an_origin_without_m_rope_is_refused_by_the_gate(tmp_path: Path) -> None:
    model = language_file(tmp_path / "model.gguf", more=[("qap.origin.architecture", text("qwen2"))])
    with pytest.raises(ModelFileError, match="expected an architecture with M-RoPE in a relabelled file, got llama"):
        relabel(model, tmp_path / "new.gguf")


def test_a_full_disk_is_told_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_file(tmp_path / "model.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConvertError, match="free some space"):
        relabel(model, tmp_path / "new.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_progress_counts_tensors_and_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    model = language_file(tmp_path / "model.gguf")
    seen: list[tuple[int, int]] = []
    relabel(model, tmp_path / "new.gguf", progress=lambda done, total, _: seen.append((done, total)))
    n = len(gguf.GGUFReader(model).tensors)
    assert seen == [(i, n) for i in range(1, n + 1)]

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relabel(model, tmp_path / "other.gguf", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "new.gguf"]


def test_large_tensors_go_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_file(tmp_path / "model.gguf")
    whole = relabel(model, tmp_path / "whole.gguf")
    monkeypatch.setattr(API, "_STEP", 1000)  # less than a head
    assert digest(relabel(model, tmp_path / "pieces.gguf")) == digest(whole)
    assert digest(relabel(whole, tmp_path / "old.gguf", undo=True)) == digest(model)


def test_the_mode_of_the_file_is_kept(tmp_path: Path) -> None:
    model = language_file(tmp_path / "model.gguf")
    model.chmod(0o640)
    assert relabel(model, tmp_path / "new.gguf").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("language", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("kind", ["F32", "Q4_K_M"])
def test_conversions_write_what_relabel_would(
    language: str, kind: str, make_llava: Callable[..., Path], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"head_dim": 16} if language == "Qwen2" else {}
    source = make_llava(text=more | {"rms_norm_eps": 1e-3}, language=language)
    first = qap.convert(source, tmp_path / "plain", quantize=kind, name="model", keep_positions=False)
    made = qap.convert(source, tmp_path / "keep", quantize=kind, name="model")
    plain, new = first.model, made.model
    assert not first.notes
    assert [note.partition(",")[0] for note in made.notes] == [f"model-{kind}.gguf is relabelled"]
    assert digest(new) == digest(relabel(plain, tmp_path / "new.gguf"))
    want, got = logits(plain, IDS), logits(new, IDS)
    print(f"\n{language} {kind}: NMSE {nmse(got, want):.1e}")
    assert nmse(got, want) <= (F32_LIMIT if kind == "F32" else QUANTIZED_LIMIT)
    assert digest(relabel(new, tmp_path / "old.gguf", undo=True)) == digest(plain)


@pytest.mark.parametrize("family", ["smolvlm", "internvl", "qwen2-vl", "glm-4.1v"])
def test_conversions_by_llama_cpp_s_converter(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from families.checkpoints import FAMILIES

    FAMILIES[family].make(tmp_path / "ckpt")
    source, options = tmp_path / "ckpt", dict[str, Any](quantize="F16", name="model")
    plain = qap.convert(source, tmp_path / "plain", **options, keep_positions=False).model
    made = qap.convert(source, tmp_path / "keep", **options)
    new = made.model
    if family in ("qwen2-vl", "glm-4.1v"):  # its image tokens keep their places as it is
        assert "qap.origin.architecture" not in gguf.GGUFReader(new).fields
        assert not made.notes
        return
    assert ["is relabelled" in note for note in made.notes] == [True]
    want, got = logits(plain, IDS), logits(new, IDS)
    assert nmse(got, want) <= ROUNDED_LIMIT["F16"]
    again = relabel(plain, tmp_path / "new.gguf")
    assert digest(relabel(again, tmp_path / "old.gguf", undo=True)) == digest(plain)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_checkpoint_that_cannot_be_relabelled(kind: str, make_llava: Callable[..., Path], tmp_path: Path) -> None:
    """Is converted as before, with a note; asked for, it is an error, and nothing is written."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = make_llava(text={"rope_theta": 500.0, "rope_scaling": scaling})
    made = qap.convert(source, tmp_path / "a", quantize=kind, name="m")
    (note,) = made.notes
    assert note.startswith("kept image tokens will be renumbered")
    assert note.endswith(": Llama 3's factors of its rotary frequencies, which no M-RoPE architecture applies")
    plain = qap.convert(source, tmp_path / "b", quantize=kind, name="m", keep_positions=False)
    assert digest(plain.model) == digest(made.model)
    with pytest.raises(ConvertError, match=rf"got Llama 3's factors .*\({tmp_path}/c/m-{kind}\.gguf\)") as caught:
        qap.convert(source, tmp_path / "c", quantize=kind, name="m", keep_positions=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_the_packaged_model_is_the_same(plain_model: Path) -> None:
    model = qap.packaged_model().model
    got, want = logits(model, IDS), logits(plain_model, IDS)
    assert nmse(got, want) <= QUANTIZED_LIMIT
