"""One KV cache and the answers that are made in it, one at a time: prompt in, tokens out.

:class:`~qap_gguf.VisionModel` and :class:`~qap_gguf.ChatHandler` share this: prefill (prefill.py), what fits, turns.
Tokens are llama-cpp-python's for both: ``Llama.generate``, over the prompt that is in the KV cache.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from qap_gguf.arguments import IndexArray
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError, ImageError, NativeError
from qap_gguf.generation.prefill import ImageRows, fill
from qap_gguf.generation.settings import AnswerSettings, GenerationStats
from qap_gguf.language.llama import LanguageModel, TextStream
from qap_gguf.language.turn_lock import Stream
from qap_gguf.pruning.prune import PrunedImage
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.encoder import ImageEncoder


def rows_of(image: ImageEmbedding, cut: PrunedImage | None) -> list[ImageRows]:
    """Rows of each piece of an image: the kept ones, or where `cut` is None all that the encoder left."""
    if cut is not None:
        return [ImageRows(piece.features, piece.indices, cut.policy) for piece in cut.pieces]
    ends = itertools.accumulate(piece.n_rows for piece in image.pieces)
    found = []
    for piece, end in zip(image.pieces, ends, strict=True):
        rows = image.features[end - piece.n_rows : end]
        left = np.delete(np.arange(piece.n_tokens, dtype=np.int32), piece.dropped) if piece.dropped else None
        found.append(ImageRows(rows, None) if left is None else ImageRows(rows[piece.rows_of(left)], left))
    return found


def kept_of(image: ImageEmbedding, cut: PrunedImage | None) -> IndexArray:
    """Numbers of the tokens of an image that the language model reads, int32 (k,), ascending."""
    return np.flatnonzero(~image.dropped).astype(np.int32) if cut is None else cut.indices


class Answers:
    """Prefill and decoding for one language model.

    Args:
        language: the language model.
        encoder: the image encoder loaded beside it.
        n_batch: tokens of a prefill batch.
        check_open: raises when one of them is closed.
        seed: of sampling; None is the Llama's own.

    Attributes:
        turns: the lock of the model, and whose answer is in the making.
        fresh: images that were encoded since the last answer: their encode counts for the next one.
    """

    def __init__(
        self,
        language: LanguageModel,
        encoder: ImageEncoder,
        n_batch: int,
        check_open: Callable[[], None],
        seed: int | None = None,
    ) -> None:
        self.turns = language.turns
        self.fresh: weakref.WeakSet[ImageEmbedding] = weakref.WeakSet()
        self._language = language
        self._encoder = encoder
        self._n_batch = n_batch
        self._check_open = check_open
        self._seed = seed

    @property
    def n_ctx(self) -> int:
        """Tokens that a prompt and its answer can have."""
        return self._language.n_ctx

    @property
    def room(self) -> int:
        """Tokens that an answer to the prompt in the KV cache can have."""
        return self._language.room

    def check_fit(
        self,
        prompt: str,
        sizes: Sequence[tuple[int, int]],
        left: Sequence[int | None],
        cfg: PruneConfig | None,
        *,
        add_special: bool,
    ) -> None:
        """Refuse a prompt that cannot fit before its pictures are encoded, which may take minutes.

        Args:
            prompt, add_special: see :meth:`place`.
            sizes: (width, height) of each picture.
            left: tokens that the encoder leaves of each, None where only sizes and `cfg` say it.
            cfg: how they will be pruned; None keeps all tokens.

        Raises:
            ConfigError: it does not fit the context, or a picture not a batch that it must stand in.
            ImageError: a picture has more tokens than the limit.
        """
        self._check_open()
        n_rows = largest = 0
        limit = self._encoder.max_tokens
        for size, n_left in zip(sizes, left, strict=True):
            counts = self._encoder.count(size)
            if limit is not None and counts.n_tokens > limit:
                raise ImageError(
                    f"image: expected at most {limit} tokens (max_image_tokens), got {counts.n_tokens} for "
                    f"{size[0]} x {size[1]} pixels; scale it down"
                )
            kept = counts.n_tokens if cfg is None else cfg.count(counts.n_real)
            kept = kept if n_left is None else min(kept, n_left)
            n_rows += kept + counts.n_special
            largest = max(largest, min(counts.largest, kept + counts.n_special))
        chunks = self._encoder.tokenize(prompt, list(sizes), add_special=add_special)
        n_text = sum(len(chunk.tokens) for chunk in chunks if not chunk.is_image)
        self._check_room(n_text + n_rows, largest)

    def _check_room(self, needed: int, largest: int) -> None:
        """`needed`: cells of the KV cache; `largest`: rows of a piece of a picture."""
        language = self._language
        if needed + 1 > language.n_ctx:
            raise ConfigError(
                f"prompt: expected at most {language.n_ctx} tokens (n_ctx), got {needed + 1}; "
                "keep fewer image tokens, or raise n_ctx"
            )
        if self._encoder.non_causal and largest > language.n_whole:
            raise ConfigError(
                f"n_batch, n_ubatch: expected at least {largest}, the rows of a picture, which this model reads in one "
                f"batch, got {language.n_whole}; load the Llama with more"
            )

    def place(
        self,
        prompt: str,
        images: Sequence[tuple[ImageEmbedding, PrunedImage | None]],
        stats: GenerationStats,
        *,
        add_special: bool,
    ) -> int:
        """Put a prompt into the KV cache.

        Args:
            prompt: its text, with a marker for each image.
            images: each image and its kept tokens, None for all of them.
            stats: what is filled in.
            add_special: let the tokenizer add BOS and the like.

        Returns:
            The number of the answer that may now be made (:class:`~qap_gguf.language.turn_lock.Turns`).

        Raises:
            ConfigError: the prompt has more tokens than fit, or does not end with text.
            NativeError: libllama refuses it, or gives logits that are not finite.
        """
        with self.turns.lock:
            self._check_open()
            chunks = self._encoder.tokenize(prompt, [image.size for image, _ in images], add_special=add_special)
            if not chunks or chunks[-1].is_image:
                raise ConfigError("prompt: expected text at its end, got none; ask something about the image")
            rows = [part for image, cut in images for part in rows_of(image, cut)]
            pieces = [chunk for chunk in chunks if chunk.is_image]
            if len(rows) != len(pieces):
                raise NativeError(
                    f"expected {len(pieces)} pieces of images, got {len(rows)}; encode them with this model"
                )
            self._count(images, stats)
            stats.n_prompt_tokens = sum(len(chunk.tokens) for chunk in chunks if not chunk.is_image)
            sizes = [len(row.features) for row in rows]
            self._check_room(stats.n_prompt_tokens + sum(sizes), max(sizes, default=0))
            number = self.turns.begin()
            started = time.perf_counter()
            with self._language.interruptible():
                stats.n_reused = fill(self._language, self._encoder, chunks, rows, self._n_batch)
                self._language.synchronize()
            stats.prefill_s = time.perf_counter() - started
            stats.n_kv = self._language.n_kv
            self._language.check_logits()
            return number

    def _count(self, images: Sequence[tuple[ImageEmbedding, PrunedImage | None]], stats: GenerationStats) -> None:
        stats.n_image_tokens = sum(image.n_tokens for image, _ in images)
        stats.n_image_kept = sum(len(kept_of(image, cut)) for image, cut in images)
        for image, _ in images:
            if image in self.fresh:
                stats.encode_s += image.seconds
                stats.encode_bytes += image.bytes_read
                self.fresh.discard(image)
            else:
                stats.n_cached += 1
        stats.score_s = sum(cut.score_s for _, cut in images if cut is not None)
        stats.select_s = sum(cut.select_s for _, cut in images if cut is not None)

    def turn(self) -> AbstractContextManager[None]:
        """Hold the model for a whole answer, or for the beginning of one that is streamed."""
        return self.turns.turn()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What one step of an answer needs, beside its turn."""
        self._check_open()
        with self._language.step():
            yield

    def decode(self, number: int, text: TextStream, stats: GenerationStats, chosen: AnswerSettings) -> Stream[str]:
        """The pieces of the answer `number`."""
        return self.turns.stream(number, self._pieces(text, stats, chosen), self.step)

    def _pieces(self, text: TextStream, stats: GenerationStats, chosen: AnswerSettings) -> Generator[str, None, None]:
        most = min(chosen.max_tokens, self.room)
        tokens = self._language.tokens(
            temperature=chosen.temperature, top_k=chosen.top_k, top_p=chosen.top_p, min_p=chosen.min_p, seed=self._seed
        )
        with contextlib.closing(tokens):
            reason = "length"
            while stats.n_generated < most:
                started = time.perf_counter()
                token = next(tokens)
                stats.decode_s += time.perf_counter() - started
                stats.n_kv = self._language.n_kv
                if self._language.is_end(token):
                    reason = "stop"
                    break
                stats.n_generated += 1
                piece = text.push(token)
                if piece:
                    yield piece
                if text.stopped:
                    reason = "stop"
                    break
        stats.finish_reason = reason
        rest = text.finish()
        if rest:
            yield rest
