"""One KV cache and the answers that are made in it, one at a time: prompt in, tokens out.

:class:`~qap_gguf.VisionModel` and :class:`~qap_gguf.ChatHandler` share this. Prefill: see prefill.py.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from qap_gguf.errors import ConfigError, NativeError
from qap_gguf.generation.prefill import ImageRows, fill
from qap_gguf.generation.settings import AnswerSettings, GenerationStats
from qap_gguf.language.llama import LanguageModel, TextStream
from qap_gguf.language.turn_lock import Stream
from qap_gguf.pruning.prune import PrunedImage
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.encoder import ImageEncoder


def rows_of(image: ImageEmbedding, cut: PrunedImage | None) -> list[ImageRows]:
    """Rows of each piece of an image: the kept ones, or all where `cut` is None."""
    if cut is not None:
        return [ImageRows(piece.features, piece.indices, cut.policy) for piece in cut.pieces]
    ends = itertools.accumulate(piece.n_rows for piece in image.pieces)
    spans = zip(image.pieces, ends, strict=True)
    return [
        ImageRows(
            image.features[end - piece.n_rows : end],
            None if piece.early is None else np.array(piece.early, np.int32),
        )
        for piece, end in spans
    ]


class Answers:
    """Prefill and decoding for one language model.

    Args:
        language: the language model.
        encoder: the image encoder loaded beside it.
        n_batch: tokens of a prefill batch.
        check_open: raises when one of them is closed.

    Attributes:
        turns: the lock of the model, and whose answer is in the making.
    """

    def __init__(
        self, language: LanguageModel, encoder: ImageEncoder, n_batch: int, check_open: Callable[[], None]
    ) -> None:
        self.turns = language.turns
        self._language = language
        self._encoder = encoder
        self._n_batch = n_batch
        self._check_open = check_open

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
        """
        with self.turns.lock:
            self._check_open()
            chunks = self._encoder.tokenize(prompt, [image.size for image, _ in images], add_special=add_special)
            if not chunks or chunks[-1].is_image:
                raise ConfigError("prompt: expected text at its end, got none; ask something about the image")
            rows = [part for image, cut in images for part in rows_of(image, cut)]
            n_pieces = sum(chunk.is_image for chunk in chunks)
            if len(rows) != n_pieces:
                raise NativeError(f"expected {n_pieces} pieces of images, got {len(rows)}; encode them with this model")
            stats.n_image_tokens = sum(image.n_total for image, _ in images)
            stats.n_image_kept = sum(image.n_tokens if cut is None else len(cut.indices) for image, cut in images)
            stats.encode_s = sum(image.seconds for image, _ in images)
            stats.encode_bytes = sum(image.bytes_read for image, _ in images)
            stats.score_s = sum(cut.score_s for _, cut in images if cut is not None)
            stats.select_s = sum(cut.select_s for _, cut in images if cut is not None)
            stats.n_prompt_tokens = sum(len(chunk.tokens) for chunk in chunks if not chunk.is_image)
            needed = stats.n_prompt_tokens + sum(len(row.features) for row in rows) + 1
            if needed > self._language.n_ctx:
                raise ConfigError(
                    f"prompt: expected at most {self._language.n_ctx} tokens (n_ctx), got {needed}; "
                    "keep fewer image tokens, or raise n_ctx"
                )
            number = self.turns.begin()
            started = time.perf_counter()
            with self._language.interruptible():
                stats.n_reused = fill(self._language, self._encoder, chunks, rows, self._n_batch)
                self._language.synchronize()
            stats.prefill_s = time.perf_counter() - started
            stats.n_kv = self._language.n_kv
            return number

    def turn(self) -> AbstractContextManager[None]:
        """Hold the model for a whole answer, or for the beginning of one that is streamed."""
        return self.turns.turn()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What one step of an answer needs, beside its turn."""
        self._check_open()
        with self._language.interruptible():
            yield

    def decode(self, number: int, text: TextStream, stats: GenerationStats, chosen: AnswerSettings) -> Stream[str]:
        """The pieces of the answer `number`."""
        return self.turns.stream(number, self._pieces(text, stats, chosen), self.step)

    def _pieces(self, text: TextStream, stats: GenerationStats, chosen: AnswerSettings) -> Generator[str, None, None]:
        language = self._language
        sampler = language.new_sampler(chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p)
        while stats.n_generated < chosen.max_tokens and not text.stopped and language.n_past < language.n_ctx:
            started = time.perf_counter()
            token = language.sample(sampler)
            if language.is_end(token):
                stats.decode_s += time.perf_counter() - started
                break
            language.prefill([token])
            language.synchronize()
            stats.decode_s += time.perf_counter() - started
            stats.n_generated += 1
            stats.n_kv = language.n_kv
            piece = text.push(token)
            if piece:
                yield piece
        rest = text.finish()
        if rest:
            yield rest
