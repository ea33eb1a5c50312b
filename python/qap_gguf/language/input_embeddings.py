"""A language model's input embeddings, read row by row from its GGUF file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qap_gguf import _core
from qap_gguf.arguments import FloatArray
from qap_gguf.errors import ModelFileError


class InputEmbeddings:
    """Rows of ``token_embd.weight`` read from a language model's file as they are asked for, dequantized by gguf-py.

    The file is opened for the first text: most models never need it.

    Args:
        path: the GGUF file.
        tokenize: text to token ids, without special tokens.
        n_embd: width of an embedding.

    Raises:
        ModelFileError: (of :meth:`mean` and :meth:`rows`) the file has no such tensor, or of another width.
    """

    def __init__(self, path: str | os.PathLike[str], tokenize: _Tokenize, n_embd: int) -> None:
        self._path = Path(path)
        self._tokenize = tokenize
        self._n_embd = n_embd
        self.mean = lru_cache(maxsize=64)(self._mean)  # the same question about many images

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.uint8], Any]:
        """(rows as stored, (n_vocab, bytes of a row); their ggml type)."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        path, n_embd = self._path, self._n_embd
        _, tensors, data_offset = _core.gguf_info(str(path))
        found = [(kind, offset, size) for name, kind, offset, size in tensors if name == b"token_embd.weight"]
        if not found:
            raise ModelFileError(f"expected token_embd.weight, found none in {path}; use a semantic other than text")
        kind, offset, size = found[0]
        ggml_type = next(t for t in GGMLQuantizationType if t.name.lower() == kind.lower())
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        row_bytes = n_embd // block * block_bytes
        if n_embd % block or size % row_bytes:
            raise ModelFileError(
                f"expected token_embd.weight of width {n_embd} in {path}; use a semantic other than text"
            )
        shape = (size // row_bytes, row_bytes)
        return np.memmap(path, dtype=np.uint8, mode="r", offset=data_offset + offset, shape=shape), ggml_type

    def _mean(self, text: str) -> FloatArray | None:
        tokens = [token for token in self._tokenize(text) if 0 <= token < self._table[0].shape[0]]
        if not tokens:
            return None
        return np.asarray(self.rows(tokens).mean(axis=0, dtype=np.float64), dtype=np.float32)

    def rows(self, tokens: Sequence[int]) -> FloatArray:
        """Input embeddings of the tokens, float32 (n, n_embd)."""
        from gguf import dequantize

        stored, ggml_type = self._table
        return np.asarray(dequantize(np.ascontiguousarray(stored[list(tokens)]), ggml_type), dtype=np.float32)


class _Tokenize(Protocol):
    def __call__(self, text: str, /) -> list[int]: ...
