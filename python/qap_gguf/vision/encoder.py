"""The image side of a vision model: pixels to tokens, and tokens into the language model's KV cache.

A thin, checked face of the native encoder (native/bindings/bind-encoder.cpp): its errors become ours, and pruning by a
process default is switched off, because the caller does it by itself.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from qap_gguf import _core
from qap_gguf.arguments import FloatArray, IndexArray, one_line
from qap_gguf.config import PruneConfig
from qap_gguf.defaults import from_params, to_params, use
from qap_gguf.errors import ConfigError, ImageError, ModelFileError, NativeError, UnsupportedError
from qap_gguf.language.llama import LanguageModel
from qap_gguf.vision.cache import encoder_identity, file_stamp
from qap_gguf.vision.embedding import ImageEmbedding, embedding_of
from qap_gguf.vision.images import Pixels
from qap_gguf.vision.resize import default_resize, loading
from qap_gguf.vision.tiles import share


class ImageEncoder:
    """An mmproj file that is loaded beside a language model.

    Raises:
        ModelFileError: the file cannot be loaded, or belongs to another model.
    """

    def __init__(
        self,
        mmproj: str | os.PathLike[str],
        language: LanguageModel,
        *,
        device: str | None,
        n_threads: int,
        flash_attn: bool | None,
        verbose: bool,
        resize: str | None = None,
    ) -> None:
        self._language = language
        #: How often the encoder has run.
        self.n_encodes = 0
        #: The file, and what else the output depends on; part of the key under which embeddings are kept.
        self.path = Path(mmproj)
        self.settings: dict[str, Any] = {"device": device, "flash_attn": flash_attn, "n_threads": n_threads}
        self.settings["resize"] = default_resize() if resize is None else resize
        self._identities: dict[tuple[bool, bool], str] = {}
        try:
            self._stamp = file_stamp(mmproj)  # before it is read: another file may take its name at any time
            with loading(resize):
                self._native = _core.Encoder(
                    mmproj=str(mmproj),
                    model=language.model_address,
                    device=device,
                    n_threads=n_threads,
                    flash_attn=flash_attn,
                    verbose=verbose,
                )
        except (RuntimeError, OSError) as err:
            raise ModelFileError(f"{mmproj}: {one_line(err)}") from err

    def identity(self, *, hidden: bool, lasting: bool) -> str:
        """The name under which embeddings of this encoder are kept, see :func:`encoder_identity`."""
        if (hidden, lasting) not in self._identities:
            settings = {**self.settings, "hidden": hidden}
            self._identities[hidden, lasting] = encoder_identity(
                self.path, settings, lasting=lasting, loaded=self._stamp
            )
        return self._identities[hidden, lasting]

    @property
    def n_embd(self) -> int:
        """Width of a token."""
        return self._native.n_embd

    @property
    def why_not_prunable(self) -> str | None:
        """None when images of this model can be pruned, else one line that says why not."""
        return self._native.why_not()

    @property
    def mrope(self) -> bool:
        """Whether the language model has positions in time, row and column (M-RoPE)."""
        return self._native.mrope()

    @property
    def file_config(self) -> PruneConfig | None:
        """The ``qap.*`` keys of the mmproj file, None where it has none."""
        params = self._native.file_params()
        return None if params is None else from_params(params)

    def tokenize(self, text: str, images: list[Any], *, add_special: bool) -> list[_core.Chunk]:
        """A prompt with one marker for each image as chunks of text and image tokens.

        Args:
            text: the prompt; special tokens in it count as such.
            images: pixels, or (width, height) where only the number of tokens matters.
            add_special: let the tokenizer add BOS and the like.
        """
        try:
            with use(None):
                return self._native.tokenize(text, images, add_special, True)
        except ValueError as err:
            raise ImageError(one_line(err)) from err

    def encode(self, pixels: Pixels, *, hidden: bool, early: PruneConfig | None = None) -> ImageEmbedding:
        """The tokens of a picture, of every tile that it is cut into; with `hidden` the projector's input as well.

        Args:
            pixels: the picture.
            hidden: keep the projector's input.
            early: drop tokens inside of the encoder as its ``encoder_keep`` says; None keeps all.

        Raises:
            UnsupportedError: the tiles of a LLaVA-NeXT whose file lacks what packs them, or no early drop here.
            ConfigError: `early` keeps more tokens than the picture has.
            NativeError: the encoder failed, or gave features that are not finite.
        """
        started = time.perf_counter()
        chunks = self.tokenize(_core.media_marker(), [pixels], add_special=False)
        tiles = [chunk for chunk in chunks if chunk.is_image]
        why_not = self._native.tiles_why_not() if len(tiles) > 1 else None
        if why_not is not None:
            raise UnsupportedError(f"image: its {len(tiles)} tiles cannot be packed as trained: {why_not}")
        params, counts = (None if early is None else to_params(early)), [0] * len(tiles)
        if early is not None and len(tiles) > 1:  # a picture of several tiles has no special rows
            counts = share([tile.n_tokens for tile in tiles], early.count(sum(tile.n_tokens for tile in tiles)))
        try:
            self.n_encodes += 1
            pairs = zip(tiles, counts, strict=True)
            features = [self._native.encode(tile, True, hidden, params, n_keep) for tile, n_keep in pairs]
        except ValueError as err:
            wrong = one_line(err).startswith(("n_keep", "encoder_layer"))
            raise (ConfigError if wrong else UnsupportedError)(one_line(err)) from err
        except RuntimeError as err:
            raise NativeError(one_line(err)) from err
        seconds = time.perf_counter() - started
        if not all(np.isfinite(rows).all() for rows in features):
            raise NativeError("expected finite features from the encoder, got others; check the mmproj file")
        n_planes = max(1, self.n_embd // self._language.n_embd)
        size = (pixels.shape[1], pixels.shape[0])
        return embedding_of(features, [tile.report() for tile in tiles], size, seconds, n_planes)

    def prefill(
        self, chunk: _core.Chunk, features: FloatArray, indices: IndexArray | None, positions: str, n_batch: int
    ) -> None:
        """Put the rows of a piece of an image into the KV cache, at the next position.

        Args:
            chunk: the piece, from :meth:`tokenize`.
            features: its rows, or the kept ones of them.
            indices: numbers of the kept tokens; None means that all are.
            positions: what becomes of theirs, a name of ``PruneConfig.positions``.
            n_batch: rows of a batch.

        Raises:
            NativeError: libllama refuses them.
        """
        language = self._language
        try:
            position = self._native.decode(
                language.context_address, chunk, features, indices, positions, language.n_past, n_batch
            )
        except (ValueError, RuntimeError) as err:
            raise NativeError(one_line(err)) from err
        language.jump(position, len(features))

    def close(self) -> None:
        """Free it."""
        self._native.close()
