"""The nodes of the graphs that this package runs, as it runs them: nothing here names an operation."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import qap_gguf as qap
from qap_gguf import _core

Node = dict[str, Any]


@contextlib.contextmanager
def watched() -> Iterator[list[Node]]:
    """The nodes of all graphs that run on this thread inside of the block, but for the encoder's."""
    nodes: list[Node] = []
    _core.watch_graphs(nodes.append)
    try:
        yield nodes
    finally:
        _core.watch_graphs(None)


@contextlib.contextmanager
def _every_picture_is_encoded() -> Iterator[None]:
    qap.set_image_cache(0)
    try:
        yield
    finally:
        qap.set_image_cache(None)


class WatchedEncoder:
    """An image encoder with libmtmd's evaluation callback, which sees every node that the scheduler runs.

    Made through llama-cpp-python's ctypes, as its chat handlers do: images are pruned by the innermost `qap.use()`.
    """

    def __init__(self, mmproj: Path | None = None, *, flash_attn: bool = True) -> None:
        import llama_cpp
        import llama_cpp.mtmd_cpp as lib

        files = qap.packaged_model()
        self._lib: Any = lib
        self._llama = llama_cpp.Llama(model_path=str(files.model), n_ctx=64, n_threads=1, verbose=False)
        self._n_embd = int(self._llama.n_embd())
        self._nodes: list[Node] = []
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)
        params = lib.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads, params.warmup = False, False, 1, False
        params.flash_attn_type = int(flash_attn)
        params.cb_eval = self._callback
        self._ctx: Any = lib.mtmd_init_from_file(str(mmproj or files.mmproj).encode(), self._llama.model, params)
        assert self._ctx is not None

    def _see(self, tensor: int, ask: bool, _: Any) -> bool:
        if ask:
            self._nodes.append(_core.node_at(tensor if isinstance(tensor, int) else _address(tensor)))
            return False  # no need to stop after this node
        return True

    def encode(self, image: Path, *, recall: bool = False) -> tuple[npt.NDArray[np.float32], list[Node]]:
        """The rows of the picture's first tile that the language model gets, and the nodes that ran.

        recall: leave the cache of encoded pictures as it is; a picture from there runs the nodes of pruning only.
        """
        with contextlib.nullcontext() if recall else _every_picture_is_encoded():
            return self._encode(image)

    def _encode(self, image: Path) -> tuple[npt.NDArray[np.float32], list[Node]]:
        lib, data = self._lib, image.read_bytes()
        buffer = (ctypes.c_uint8 * len(data)).from_buffer(bytearray(data))
        bitmap = lib.mtmd_helper_bitmap_init_from_buf(self._ctx, buffer, len(data), False)
        chunks = lib.mtmd_input_chunks_init()
        text = lib.mtmd_default_marker()
        what = lib.mtmd_input_text(text, len(text), False, True)
        try:
            bitmaps = (lib.mtmd_bitmap_p_ctypes * 1)(bitmap)
            assert lib.mtmd_tokenize(self._ctx, chunks, ctypes.byref(what), bitmaps, 1) == 0
            every = [lib.mtmd_input_chunks_get(chunks, i) for i in range(lib.mtmd_input_chunks_size(chunks))]
            chunk = next(c for c in every if lib.mtmd_input_chunk_get_type(c) == lib.MTMD_INPUT_CHUNK_TYPE_IMAGE)
            self._nodes.clear()
            assert lib.mtmd_encode_chunk(self._ctx, chunk) == 0
            shape = (int(lib.mtmd_input_chunk_get_n_tokens(chunk)), self._n_embd)
            rows = np.array(np.ctypeslib.as_array(lib.mtmd_get_output_embd(self._ctx), shape=shape))
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)
        return rows, list(self._nodes)

    def close(self) -> None:
        self._lib.mtmd_free(self._ctx)
        self._llama.close()


def _address(pointer: Any) -> int:
    found = ctypes.cast(pointer, ctypes.c_void_p).value
    assert found is not None
    return found
