"""The image side of a vision model: pixels to tokens, and tokens into the language model's KV cache.

A thin, checked face of the native encoder (native/bindings/bind-encoder.cpp): its errors become ours, and pruning by a
process default is switched off, because the caller does it by itself.
"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from qap_gguf import _core
from qap_gguf.arguments import MOST_IMAGE_TOKENS, FloatArray, IndexArray, check_integer, one_line
from qap_gguf.config import LEVELS, PruneConfig
from qap_gguf.defaults import from_params, to_params, use
from qap_gguf.errors import ConfigError, ImageError, ModelFileError, NativeError, UnsupportedError
from qap_gguf.language.llama import LanguageModel
from qap_gguf.language.prompt_length import PromptLimit
from qap_gguf.vision.cache import encoder_identity, file_stamp
from qap_gguf.vision.embedding import ImageEmbedding, embedding_of, is_usable
from qap_gguf.vision.images import Pixels
from qap_gguf.vision.resize import default_resize, loading
from qap_gguf.vision.thumbnail import thumbnail

#: Said where a model is pruned only because ``force_family`` is set.
FORCED: Final = "this family was not compared with its original here; pruned because force_family is set"

_SIDES = (4096, 2048, 1024, 256)
_LARGE = [(4096, side) for side in _SIDES] + [(side, 4096) for side in _SIDES]  # sizes that become many tokens


@dataclass(frozen=True)
class Counts:
    """What a picture becomes.

    Attributes:
        n_tokens: its tokens before pruning, padding among them.
        n_real: those that are no padding.
        n_special: further rows that are no tokens, such as ends of lines.
        largest: rows of its largest piece.
        n_pos: positions of all its rows.
    """

    n_tokens: int
    n_real: int
    n_special: int
    largest: int
    n_pos: int


def max_image_tokens() -> int | None:
    """``QAP_MAX_IMAGE_TOKENS`` of the environment, None where it is not set.

    Raises:
        ConfigError: it is no number from 1 to 65536.
    """
    text = os.environ.get("QAP_MAX_IMAGE_TOKENS", "")
    if not text:
        return None
    value = int(text) if text.isascii() and text.isdigit() else text
    check_integer("QAP_MAX_IMAGE_TOKENS", value, 1, MOST_IMAGE_TOKENS)
    return int(value)


def _refused(err: ValueError) -> ConfigError | UnsupportedError:
    """Our error for what the native encoder says of tokens that it was to leave out."""
    text = one_line(err)
    return ConfigError(text) if text.startswith("encoder_layer") else UnsupportedError(text)


def _are_twins(tile: _core.Chunk, earlier: _core.Chunk, report: Any, early: Any) -> bool:
    """Whether an encode of `tile` would give what that of `earlier` gave: of two that are flat the overview is encoded,
    the tile is not."""
    if not tile.same_picture(earlier):
        return False
    shows_something = earlier.is_tile and report is not None and (report["early"] is None or len(report["early"]) > 0)
    return early is None or tile.is_tile == earlier.is_tile or shows_something


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
        max_tokens: int | None = None,
        force_family: bool = False,
    ) -> None:
        self._language = language
        #: The most tokens of a picture, None: as many as the model makes of it.
        self.max_tokens = max_image_tokens() if max_tokens is None else max_tokens
        self._limit = PromptLimit(language.llama)
        #: How often the encoder has run.
        self.n_encodes = 0
        #: The file, and what else the output depends on; part of the key under which embeddings are kept.
        self.path = Path(mmproj)
        self.settings: dict[str, Any] = {"device": device, "flash_attn": flash_attn, "n_threads": n_threads}
        self.settings["resize"] = default_resize() if resize is None else resize
        self.settings["max_tokens"] = self.max_tokens
        self._identities: dict[tuple[bool, bool], str] = {}
        try:
            self._stamp = file_stamp(mmproj)  # before it is read: another file may take its name at any time
            with loading(resize, force_family=force_family):
                self._native = _core.Encoder(
                    mmproj=str(mmproj),
                    model=language.model_address,
                    device=device,
                    n_threads=n_threads,
                    flash_attn=flash_attn,
                    max_tokens=self.max_tokens,
                    verbose=verbose,
                )
        except (RuntimeError, OSError) as err:
            raise ModelFileError(f"{mmproj}: {one_line(err)}") from err
        if self._native.forced():
            warnings.warn(FORCED, UserWarning, stacklevel=3)
        #: Bytes of its weights that lie where ggml's faster kernels read them; ``QAP_ENCODER_REPACK=0``: none.
        self.repacked_bytes = self._native.repacked()
        self.settings["repacked"] = self.repacked_bytes
        if self.max_tokens is not None:
            most = max(self.count(size).n_tokens for size in _LARGE)
            if most > self.max_tokens:
                self.close()
                raise ConfigError(
                    f"max_image_tokens: expected at least {most}, the least that this model can be held to, "
                    f"got {self.max_tokens}; leave it out and prune"
                )

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
    def places(self) -> str:
        """What a kept token's own place is: "grid" (time, row and column; M-RoPE), "index" (a relabelled language
        model, MiniCPM-V 4.6) or "none", where the language model cannot leave gaps."""
        return self._native.places()

    @property
    def non_causal(self) -> bool:
        """Whether the rows of a picture see each other, and so must stand in one batch."""
        return self._native.non_causal()

    @property
    def file_config(self) -> PruneConfig | None:
        """The ``qap.*`` keys of the mmproj file, None where it has none."""
        params = self._native.file_params()
        return None if params is None else from_params(params)

    @cached_property
    def channel_weights(self) -> FloatArray | None:
        """``qap.channel_weights`` of the mmproj file, float32 (width of a token in the language model,), for error
        "model"; None where it has none."""
        return self._native.channel_weights()

    def tokenize(self, text: str, images: list[Any], *, add_special: bool) -> list[_core.Chunk]:
        """A prompt with one marker for each image as chunks of text and image tokens.

        Args:
            text: the prompt; special tokens in it count as such.
            images: pixels, or (width, height) where only the number of tokens matters.
            add_special: let the tokenizer add BOS and the like.

        Raises:
            ConfigError: the text alone is too long for the context.
            ImageError: the images do not fit the markers.
        """
        self._limit.check(text)
        try:
            with use(None):
                return self._native.tokenize(text, images, add_special, True)
        except ValueError as err:
            raise ImageError(one_line(err)) from err

    def _encode_tiles(self, tiles: list[Any], hidden: bool, early: Any) -> tuple[list[FloatArray], list[Any]]:
        """Rows and reports; tiles with the same pixels (blank paper, a screenshot's background) are encoded once."""
        features: list[FloatArray] = []
        reports: list[Any] = []
        for tile in tiles:
            twin = next((i for i, report in enumerate(reports) if _are_twins(tile, tiles[i], report, early)), None)
            if twin is None:
                features.append(self._native.encode(tile, True, hidden, early))
                reports.append(tile.report())
            else:
                features.append(features[twin])
                reports.append(None if reports[twin] is None else {**reports[twin], "bytes_read": 0})
        return features, reports

    def count(self, size: tuple[int, int]) -> Counts:
        """What a picture of (width, height) would become, without encoding it.

        Raises:
            ImageError: libmtmd takes no picture of this size.
        """
        pieces = [chunk for chunk in self.tokenize(_core.media_marker(), [size], add_special=False) if chunk.is_image]
        rows, special = [chunk.n_tokens for chunk in pieces], sum(chunk.n_special for chunk in pieces)
        n_tokens = sum(rows) - special
        n_real = n_tokens - sum(chunk.n_padding for chunk in pieces)
        return Counts(n_tokens, n_real, special, max(rows), sum(chunk.n_pos for chunk in pieces))

    def count_left(self, pixels: Pixels, cfg: PruneConfig | None) -> int | None:
        """Tokens that the encoder will leave of a picture, without encoding it: what is no padding, in no flat tile, no
        duplicate, and not dropped early. None where `cfg` does not look at pixels.

        Raises:
            ConfigError, ImageError, UnsupportedError: as :meth:`encode`.
        """
        if cfg is None or self.why_not_prunable is not None or all(getattr(cfg, name) is None for name in LEVELS):
            return None
        n_special = self.count((pixels.shape[1], pixels.shape[0])).n_special
        names = ("encoder_keep", "encoder_layer", *LEVELS)
        everything = PruneConfig(keep_ratio=1.0, **{name: getattr(cfg, name) for name in names})
        try:
            with use(everything):
                chunks = self._native.tokenize(_core.media_marker(), [pixels], False, True)
        except ValueError as err:
            raise _refused(err) from err
        return sum(chunk.n_tokens for chunk in chunks if chunk.is_image) - n_special

    def encode(self, pixels: Pixels, *, hidden: bool, early: PruneConfig | None = None) -> ImageEmbedding:
        """All tokens of a picture, of every tile that it is cut into; with `hidden` the projector's input as well.

        Args:
            pixels: the picture.
            hidden: note the projector's input.
            early: the config whose tokens are left out (``PruneConfig.drops_early``); None leaves none out.

        Raises:
            ConfigError: `early` names a layer that the encoder does not have.
            UnsupportedError: the tiles of a LLaVA-NeXT whose file lacks what packs them; this encoder needs all tokens.
            NativeError: the encoder failed, or gave features that are not finite.
        """
        started = time.perf_counter()
        chunks = self.tokenize(_core.media_marker(), [pixels], add_special=False)
        tiles = [chunk for chunk in chunks if chunk.is_image]
        why_not = self._native.tiles_why_not() if len(tiles) > 1 else None
        if why_not is not None:
            raise UnsupportedError(f"image: its {len(tiles)} tiles cannot be packed as trained: {why_not}")
        try:
            self.n_encodes += 1
            params = None if early is None else to_params(early)
            features, reports = self._encode_tiles(tiles, hidden, params)
        except ValueError as err:
            raise _refused(err) from err
        except RuntimeError as err:
            raise NativeError(one_line(err)) from err
        seconds = time.perf_counter() - started
        if not all(is_usable(rows) for rows in features):
            raise NativeError("expected finite features from the encoder, got others; check the mmproj file")
        n_planes = max(1, self.n_embd // self._language.n_embd)
        size = (pixels.shape[1], pixels.shape[0])
        levels = {} if early is None else {name: getattr(early, name) for name in LEVELS}
        return embedding_of(features, reports, size, seconds, n_planes, thumbnail(pixels), **levels)

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
        language.announce("image")
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
