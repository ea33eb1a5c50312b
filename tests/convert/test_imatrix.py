"""Importance matrices: both file formats, what the quantizer does with them, and files that are none."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert.test_mmproj import fields, tensors
from qap_gguf.convert import convert
from qap_gguf.convert.output.imatrix import read_imatrix
from qap_gguf.errors import ConvertError

Entries = dict[str, Any]
UP, DOWN = "blk.0.ffn_up.weight", "blk.1.ffn_down.weight"


def write_gguf(path: Path, entries: Entries, counts: list[float], *, keys: bool = True) -> Path:
    """A file as llama-imatrix writes it: sums of squares, and how many rows were summed for each expert."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "imatrix")
    if keys:
        writer.add_array("imatrix.datasets", ["wiki.txt"])
        writer.add_uint32("imatrix.chunk_count", 7)
        writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in entries.items():
        sums = np.asarray(values, "<f4").reshape(len(counts), -1) * np.maximum(np.asarray(counts, "<f4"), 1)[:, None]
        writer.add_tensor(f"{name}.in_sum2", sums.astype("<f4"))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, "<f4").reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def old_bytes(entries: Entries, n_calls: int = 3, tail: bytes = struct.pack("<ii8s", 7, 8, b"wiki.txt")) -> bytes:
    out = struct.pack("<i", len(entries))
    for name, values in entries.items():
        floats = np.asarray(values, "<f4") * n_calls
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", n_calls, floats.size) + floats.tobytes()
    return out + tail


def steep(width: int) -> Any:
    return np.linspace(0.0, 1.0, width, dtype="<f4") ** 8 * 100


@pytest.fixture
def entries() -> Entries:
    """For the two matrices of the tiny model."""
    return {UP: steep(64), DOWN: steep(96)}


def test_both_formats_say_the_same(tmp_path: Path, entries: Entries) -> None:
    old = tmp_path / "x.dat"
    old.write_bytes(old_bytes(entries))
    new = write_gguf(tmp_path / "x.gguf", entries, [5.0])
    for path in (old, new):
        got = read_imatrix(path)
        assert (got.path, got.dataset, got.n_chunks, set(got.entries)) == (path, "wiki.txt", 7, {UP, DOWN})
        for name, values in entries.items():
            np.testing.assert_allclose(got.entries[name], values, rtol=1e-6)
    old.write_bytes(old_bytes(entries, tail=b""))
    assert (read_imatrix(old).dataset, read_imatrix(old).n_chunks) == ("", 0)


def test_an_expert_that_was_never_used_counts_as_even(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {"e": [[2.0, 4.0], [8.0, 8.0]]}, [2.0, 0.0])
    np.testing.assert_array_equal(read_imatrix(path).entries["e"], [2, 4, 1, 1])


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_the_quantizer_minds_it(plain_llava: Path, tmp_path: Path, entries: Entries, kind: str) -> None:
    """Only the matrices in the file change, and they err less where it matters."""
    path = write_gguf(tmp_path / "x.gguf", entries, [5.0])
    without = convert(plain_llava, tmp_path / "a", quantize=kind, name="t", keep_positions=False).model
    minded = convert(plain_llava, tmp_path / "b", quantize=kind, name="t", imatrix=path, keep_positions=False).model
    exact = tensors(convert(plain_llava, tmp_path / "c", quantize="F32", name="t").model)
    before, after = tensors(without), tensors(minded)
    changed = {name for name in before if not np.array_equal(before[name].data, after[name].data)}
    assert changed == {UP, DOWN}
    for name, weight in entries.items():
        errors = [
            ((gguf.dequantize(t.data, t.tensor_type) - exact[name].data) ** 2 * weight).sum()
            for t in (before[name], after[name])
        ]
        assert errors[1] < errors[0], name
    keys = fields(minded)
    assert {k: v for k, v in keys.items() if k.startswith("quantize.imatrix")} == {
        "quantize.imatrix.file": "x.gguf", "quantize.imatrix.dataset": "wiki.txt",
        "quantize.imatrix.entries_count": 2, "quantize.imatrix.chunks_count": 7,
    }  # fmt: skip
    assert {k: v for k, v in keys.items() if not k.startswith("quantize.imatrix")} == fields(without)


def test_a_very_low_bit_type_needs_one(make_llava: Any, tmp_path: Path) -> None:
    folder = make_llava(text={"hidden_size": 256, "intermediate_size": 256, "head_dim": 64})
    shapes = {n: t.shape[0] for n, t in tensors(convert(folder, tmp_path, quantize="F16", name="f").model).items()}
    everything = {name: steep(int(width)) + 0.01 for name, width in shapes.items() if name.startswith("blk.")}
    everything["output.weight"] = steep(256) + 0.01
    path = write_gguf(tmp_path / "x.gguf", everything, [5.0])
    made = tensors(convert(folder, tmp_path, quantize="IQ2_XXS", name="t", imatrix=path, force=True).model)
    assert "IQ2_XXS" in {tensor.tensor_type.name for tensor in made.values()}


def test_long_texts_are_cut_between_characters(tmp_path: Path, entries: Entries) -> None:
    path = tmp_path / "x.dat"
    name = "\u00e9" * 200
    path.write_bytes(old_bytes(entries, tail=struct.pack("<ii", 1, 400) + name.encode()))
    got = read_imatrix(path)
    stored = {item.key.decode(): item.value.val_str for item in got.keys()[1:2]}
    assert stored["quantize.imatrix.dataset"].decode() == "\u00e9" * 63


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: {"blk.0.other.weight": e[UP]}, "this model's tensors, got blk.0.other.weight"),
        (lambda e: e | {UP: steep(128)}, r"64 channels for blk\.0\.ffn_up\.weight, got 128"),
        (lambda e: e | {UP: e[UP] * np.nan}, "finite values from 0 up for blk.0.ffn_up.weight"),
        (lambda e: e | {DOWN: -e[DOWN]}, "finite values from 0 up for blk.1.ffn_down.weight"),
        (lambda e: {}, "entries, found none|tensors, found none"),
    ],
)
@pytest.mark.parametrize("form", ["gguf", "old"])
def test_a_wrong_imatrix_is_one_line(
    plain_llava: Path, tmp_path: Path, entries: Entries, change: Any, words: str, form: str
) -> None:
    path = tmp_path / "x"
    if form == "gguf":
        write_gguf(path, change(entries), [5.0])
    else:
        path.write_bytes(old_bytes(change(entries)))
    with pytest.raises(ConvertError, match=words) as caught:
        convert(plain_llava, tmp_path / "out", quantize="Q4_0", imatrix=path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_imatrix(plain_llava: Path, tmp_path: Path, entries: Entries) -> None:
    def refusal(imatrix: Path, quantize: str = "Q4_0") -> str:
        with pytest.raises(ConvertError) as caught:
            convert(plain_llava, tmp_path / "out", quantize=quantize, imatrix=imatrix)
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "x"
    assert "cannot open" in refusal(path)
    whole = old_bytes(entries)
    for raw in (b"", b"abc", b"hello world, this is no imatrix", whole[:100], whole[:-3], b"\xff" * 100, b"\x7f" * 50):
        path.write_bytes(raw)
        assert "expected an imatrix" in refusal(path), raw[:8]
    assert "imatrix.datasets" in refusal(write_gguf(path, entries, [5.0], keys=False))
    assert "imatrix.datasets" in refusal(convert(plain_llava, tmp_path / "m", quantize="Q8_0").model)
    path.write_bytes(write_gguf(tmp_path / "y", entries, [5.0]).read_bytes()[:-400])
    assert "cut short" in refusal(path)
    assert "one count for each row" in refusal(write_gguf(path, {UP: np.ones(64)}, [float("nan")]))
    assert "quantized type with an imatrix, got F16" in refusal(write_gguf(path, entries, [5.0]), quantize="F16")
