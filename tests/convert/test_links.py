"""Links in a checkpoint folder: the hub's cache is made of them, and one that leads elsewhere is refused."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from qap_gguf.convert import convert
from qap_gguf.errors import ConvertError


def hub_cache(source: Path, root: Path, revision: str = "0123abc") -> Path:
    """The files of `source` as huggingface_hub keeps them; returns the snapshot's folder."""
    blobs, snapshot = root / "blobs", root / "snapshots" / revision
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        data = path.read_bytes()
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


def test_a_hub_snapshot_converts(plain_llava: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(plain_llava, tmp_path / "models--a--b")
    want = convert(plain_llava, tmp_path / "want", quantize="F16", name="t")
    for place in (snapshot, tmp_path / "link"):
        if place != snapshot:
            place.symlink_to(snapshot)
        got = convert(place, tmp_path / f"got-{place.name}", quantize="F16", name="t")
        assert got.model.read_bytes() == want.model.read_bytes()


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("hub", [False, True])
def test_a_link_out_of_the_folder_is_refused(plain_llava: Path, tmp_path: Path, name: str, hub: bool) -> None:
    private = tmp_path / "private"
    folder = hub_cache(plain_llava, tmp_path / "cache") if hub else Path(shutil.copytree(plain_llava, tmp_path / "c"))
    private.write_text("secret")
    if (folder / name).exists():
        shutil.copy(folder / name, private)
        (folder / name).unlink()
    (folder / name).symlink_to(private)
    with pytest.raises(ConvertError, match=f"got a link {name}") as caught:
        convert(folder, tmp_path / "out", quantize="F16")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_link_inside_the_folder_is_followed(plain_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain_llava, tmp_path / "c"))
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "w.bin")
    (folder / "model.safetensors").symlink_to(Path("weights") / "w.bin")
    (folder / "README.md").symlink_to(tmp_path / "no such file")  # nobody reads it
    convert(folder, tmp_path / "out", quantize="F16")


def test_a_link_to_nothing_is_one_line(plain_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain_llava, tmp_path / "c"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(ConvertError, match=r"model\.safetensors"):
        convert(folder, tmp_path / "out")
