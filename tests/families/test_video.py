"""Frames of a video: Qwen-VL's encoders merge two of them into one block of tokens, on the drop-in path of libmtmd.

The caller marks frames with mtmd_bitmap_set_mergeable; transformers' video features are the truth.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qap_gguf as qap  # before mtmd_cpp, whose library it chooses
from conftest import Converted

import llama_cpp  # isort: skip
import llama_cpp.mtmd_cpp as lib  # isort: skip

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from families.checkpoints import FAMILIES, Family  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

Array = npt.NDArray[Any]


def video_features(model: Any, frames: Array, family: Family) -> Array:
    """transformers' rows for two frames (2, height, width, 3), in groups of 2 x 2 patches, line by line."""
    normal = ((frames.astype("f4") / 255 - family.mean) / family.std).astype("f4")
    patch = model.config.vision_config.patch_size
    _, height, width, _ = frames.shape
    rows, columns = height // patch, width // patch
    x = torch.tensor(normal.transpose(0, 3, 1, 2).copy())
    x = x.reshape(1, 2, 3, rows // 2, 2, patch, columns // 2, 2, patch).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    with torch.no_grad():
        out = model.model.get_video_features(
            pixel_values_videos=x.reshape(rows * columns, -1), video_grid_thw=torch.tensor([[1, rows, columns]])
        )
    main = getattr(out, "pooler_output", out)
    main = torch.cat([part.reshape(-1, part.shape[-1]) for part in main])
    planes = [torch.cat(list(p)) if isinstance(p, (list, tuple)) else p for p in getattr(out, "deepstack_features", [])]
    return np.asarray(torch.cat([main, *planes], dim=-1).numpy())


class Frames:
    """libmtmd as a caller in C uses it."""

    def __init__(self, mmproj: Path, model: Path) -> None:
        self._llama = llama_cpp.Llama(str(model), n_ctx=256, n_threads=2, verbose=False)
        params = lib.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads, params.warmup = False, False, 2, False
        params.flash_attn_type = 0
        self._ctx: Any = lib.mtmd_init_from_file(str(mmproj).encode(), self._llama.model, params)
        assert self._ctx is not None
        self._width = int(llama_cpp.llama_model_n_embd_inp(self._llama.model))

    def encode(self, frames: Array, mergeable: bool) -> list[Array]:
        """The rows of each image chunk."""
        _, height, width, _ = frames.shape
        bitmaps = []
        for frame in frames:
            data = np.ascontiguousarray(frame)
            bitmap = lib.mtmd_bitmap_init(width, height, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
            lib.mtmd_bitmap_set_mergeable(bitmap, mergeable)
            bitmaps.append(bitmap)
        text = lib.mtmd_default_marker() * len(frames)
        what = lib.mtmd_input_text(text, len(text), False, True)
        chunks = lib.mtmd_input_chunks_init()
        rows = []
        try:
            some = (lib.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            assert lib.mtmd_tokenize(self._ctx, chunks, ctypes.byref(what), some, len(bitmaps)) == 0
            for i in range(lib.mtmd_input_chunks_size(chunks)):
                chunk = lib.mtmd_input_chunks_get(chunks, i)
                if lib.mtmd_input_chunk_get_type(chunk) == lib.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    assert lib.mtmd_encode_chunk(self._ctx, chunk) == 0
                    shape = (int(lib.mtmd_input_chunk_get_n_tokens(chunk)), self._width)
                    rows.append(np.array(np.ctypeslib.as_array(lib.mtmd_get_output_embd(self._ctx), shape=shape)))
        finally:
            lib.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                lib.mtmd_bitmap_free(bitmap)
        return rows

    def close(self) -> None:
        lib.mtmd_free(self._ctx)
        self._llama.close()


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def video(request: pytest.FixtureRequest, converted: Converted) -> Iterator[tuple[Frames, Any]]:
    """The encoder, two frames, and transformers' rows for them."""
    family = FAMILIES[request.param]
    hf, _, files = converted(request.param)
    width, height = family.image
    frames = np.random.default_rng(6).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    encoder = Frames(files.mmproj, files.model)
    yield encoder, (frames, video_features(hf, frames, family))
    encoder.close()


def test_two_frames_are_one_block_of_tokens_as_in_transformers(video: tuple[Frames, Any]) -> None:
    encoder, (frames, want) = video
    (got,) = encoder.encode(frames, mergeable=True)
    assert got.shape == want.shape
    assert float(((got - want) ** 2).sum() / (want**2).sum()) <= 1e-5
    assert len(encoder.encode(frames, mergeable=False)) == 2


@pytest.mark.parametrize("select", ["topk", "dpp"])
def test_frames_are_pruned_to_rows_of_the_whole(video: tuple[Frames, Any], select: str) -> None:
    encoder, (frames, _) = video
    (whole,) = encoder.encode(frames, mergeable=True)
    keep = len(whole) // 2
    with qap.use(qap.PruneConfig(n_keep=keep, select=select)):
        (kept,) = encoder.encode(frames, mergeable=True)
    at = [int(np.flatnonzero((whole == row).all(axis=1))[0]) for row in kept]
    assert len(at) == keep
    assert at == sorted(set(at))
