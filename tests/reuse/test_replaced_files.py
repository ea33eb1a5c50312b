"""An mmproj file that is replaced, moved or removed while it is loaded: no embedding is kept under another's name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf.vision.cache import encoder_identity, file_stamp

FILES = qap.packaged_model()


def other_weights(path: Path) -> Path:
    """The packaged mmproj with other numbers in its last tensors."""
    data = bytearray(FILES.mmproj.read_bytes())
    data[-40_000:-20_000] = data[-20_000:]
    path.write_bytes(data)
    return path


def features(vlm: qap.VisionModel) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return vlm.encode(FILES.sample).features


def opened(path: Path, cache: qap.EmbeddingCache | None = None) -> qap.VisionModel:
    return qap.VisionModel(path, FILES.model, n_ctx=64, n_threads=1, cache=cache)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "folder"])
def test_replaced_between_loading_and_the_first_encode(tmp_path: Path, on_disk: bool) -> None:
    """The old encoder is in memory, its name is the new file's: what it makes must not be served to the new one."""
    path, new = Path(shutil.copy(FILES.mmproj, tmp_path / "mmproj.gguf")), other_weights(tmp_path / "new.gguf")
    with opened(new) as vlm:
        expected = features(vlm)
    cache = qap.EmbeddingCache(folder=tmp_path / "kept" if on_disk else None)
    with opened(path, cache) as old:
        os.replace(new, path)
        before = features(old)
        assert features(old) is before  # it is still kept for itself
        with opened(path, cache) as vlm:
            found = features(vlm)
            assert vlm.n_encodes == 1
    assert not np.array_equal(before, expected)
    np.testing.assert_array_equal(found, expected)
    with opened(path, qap.EmbeddingCache(folder=tmp_path / "kept") if on_disk else cache) as vlm:
        np.testing.assert_array_equal(features(vlm), expected)
        assert vlm.n_encodes == 0


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "folder"])
def test_removed_before_the_first_encode(tmp_path: Path, on_disk: bool) -> None:
    path = Path(shutil.copy(FILES.mmproj, tmp_path / "mmproj.gguf"))
    with opened(path, qap.EmbeddingCache(folder=tmp_path / "kept" if on_disk else None)) as vlm:
        path.unlink()
        assert features(vlm) is features(vlm)
        assert vlm.n_encodes == 1


def test_the_name_of_a_file_that_is_gone_comes_never_again(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"one")
    stamp = file_stamp(path)
    whole = encoder_identity(path, {}, lasting=True, loaded=stamp)
    assert encoder_identity(path, {}, lasting=True) == whole
    path.write_bytes(b"other")
    names = [encoder_identity(path, {}, lasting=True, loaded=stamp) for _ in range(2)]
    path.unlink()
    names += [encoder_identity(path, {}, lasting=True, loaded=stamp)]
    assert len({whole, *names}) == 4
    assert len({encoder_identity(path, {}, lasting=False, loaded=stamp) for _ in range(2)}) == 1
