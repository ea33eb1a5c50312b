"""Checkpoints as `pytorch_model.bin`: the same files come out, and a pickle with code in it is refused unread."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qap_gguf.convert import convert
from qap_gguf.convert.source.torch_file import torch_tensors
from qap_gguf.errors import ConvertError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def as_bin(source: Path, folder: Path, shards: int = 1) -> Path:
    """A copy of `source` with torch files in place of model.safetensors."""
    shutil.copytree(source, folder)
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = list(tensors)
    places = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        torch.save({name: tensors[name] for name in names if places[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_files_are_those_of_the_safetensors(make_llava: Any, tmp_path: Path, dtype: str, shards: int) -> None:
    folder = make_llava(dtype=dtype)
    want = convert(folder, tmp_path / "want", quantize="F16", name="t")
    got = convert(as_bin(folder, tmp_path / "bin", shards), tmp_path / "got", quantize="F16", name="t")
    assert got.model.read_bytes() == want.model.read_bytes()
    assert got.mmproj.read_bytes() == want.mmproj.read_bytes()


def test_tied_and_transposed_views_are_read_as_values(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    path = tmp_path / "x.bin"
    torch.save({"a": base, "b": base, "t": base.T, "part": base[1:3, 2:], "empty": base[:0]}, path)
    refs = torch_tensors(path)
    assert {name: ref.shape for name, ref in refs.items()} == {
        "a": (4, 6), "b": (4, 6), "t": (6, 4), "part": (2, 4), "empty": (0, 6),
    }  # fmt: skip
    for name, want in {"a": base, "b": base, "t": base.T, "part": base[1:3, 2:], "empty": base[:0]}.items():
        assert refs[name].read().tolist() == want.tolist(), name


class Bomb:
    """What a hostile file holds: unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def save_bomb(folder: Path) -> None:
    torch.save({"x": Bomb(folder / "exploded")}, folder / "pytorch_model.bin")


def save_raw_bomb(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded")))


def poison(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    next(t for n, t in tensors.items() if n.endswith("layers.1.mlp.up_proj.weight"))[3, 4] = float("nan")
    torch.save(tensors, path)


def reshape(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
    torch.save({**tensors, name: tensors[name].T}, path)


def text(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text("<html>not found</html>")


def half(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def short_storage(folder: Path) -> None:
    """The largest tensor's bytes cut to a few, the pickle unchanged."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as old:
        rows = [(info.filename, old.read(info)) for info in old.infolist()]
    largest = max(rows, key=lambda row: len(row[1]))[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, data in rows:
            new.writestr(name, data[:8] if name == largest else data)


def save(value: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / "pytorch_model.bin")


def index(**places: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))

    return apply


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (save_bomb, r"a pickle with something else in it \(it asks for \w+\.mkdir\); do not use this file"),
    "code without torch's zip": (save_raw_bomb, "pytorch_model.bin"),
    "nan": (poison, "NaN or infinity in .*up_proj"),
    "shape": (reshape, r"\[96, 64\].*\[64, 96\]"),
    "cut short": (half, "cannot read .*pytorch_model.bin as a torch file"),
    "text": (text, "in the zip format"),
    "a list": (save([torch.zeros(2)]), "got list"),
    "nested": (save({"state_dict": {"a": torch.zeros(2)}}), "got dict as 'state_dict'"),
    "a number": (save({"a": 1}), "got int as 'a'"),
    "integers": (save({"lm_head.weight": torch.zeros(2, dtype=torch.int8)}), "not quantized"),
    "sparse": (save({"lm_head.weight": torch.zeros(2, 2).to_sparse()}), "plain tensors"),
    "old format": (
        lambda f: torch.save({}, f / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        "torch 1.6 and newer, got another",
    ),
    "no shard": (index(a="pytorch_model-00001-of-00002.bin"), "expected the shard"),
    "a shard elsewhere": (index(a="../x.bin"), "expected the shard"),
    "an absolute shard": (index(a="/etc/hostname"), "expected the shard"),
}


@pytest.fixture(scope="module")
def bin_llava(plain_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_bin(plain_llava, tmp_path_factory.mktemp("bin") / "ckpt")


@pytest.mark.parametrize("case", list(CASES))
def test_bad_torch_files_end_in_one_line(bin_llava: Path, tmp_path: Path, case: str) -> None:
    change, words = CASES[case]
    folder = Path(shutil.copytree(bin_llava, tmp_path / "copy"))
    change(folder)
    with pytest.raises(ConvertError, match=words) as caught:
        convert(folder, tmp_path / "out", quantize="F16")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (folder / "exploded").exists()


def test_a_short_storage_never_reads_beyond_the_file(bin_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bin_llava, tmp_path / "copy"))
    short_storage(folder)
    with pytest.raises(ConvertError) as caught:
        convert(folder, tmp_path / "out", quantize="F16")
    assert "\n" not in str(caught.value)


def test_without_torch_the_extra_is_named(bin_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConvertError, match=r"pip install torch"):
        convert(bin_llava, tmp_path / "out")


def test_an_old_torch_is_refused(bin_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ConvertError, match=r"torch 2\.6 or newer"):
        convert(bin_llava, tmp_path / "out")
