"""A tokenized prompt into the KV cache: text tokens and kept image rows, in their order, as far as they are new.

llama-cpp-python notes the tokens of its KV cache in ``Llama.input_ids``. An image has no token ids, so its positions
get negative numbers that are made from what is in the cache there: the rows and their places. No text has such
numbers, and no other image; hence whoever compares ``input_ids`` with a prompt finds equal what is equal.

What is reused, and why no more: a prompt is evaluated in steps, a batch of text or an image, and a step is kept when
it and all before it are the same as in the last prompt. A step is kept as a whole or not at all: ggml has different
kernels for batches of different sizes, and the last bits of their results differ. So an answer is the same, bit for
bit, with and without reuse. The last step is always evaluated, because it gives the logits of the first token.

A model with recurrent layers (Qwen3.5, LFM2) keeps one state for all tokens before, of which nothing can be taken back.
Their state after the last image is copied, and a prompt that begins with the same steps up to there goes on from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qap_gguf import _core
from qap_gguf.arguments import FloatArray, IndexArray
from qap_gguf.language.kv_record import Done, image_ids

if TYPE_CHECKING:
    from qap_gguf.language.llama import LanguageModel
    from qap_gguf.vision.encoder import ImageEncoder


@dataclass(frozen=True, eq=False)
class ImageRows:
    """What the language model gets of a piece of an image.

    Attributes:
        features: the rows, float32 (n_rows, n_embd): kept tokens and special rows.
        indices: numbers of the kept tokens in the piece, int32 (k,), ascending; None where it is all of them.
        positions: what becomes of their positions, a name of ``PruneConfig.positions``.
    """

    features: FloatArray
    indices: IndexArray | None
    positions: str = "auto"

    def digest(self, chunk: _core.Chunk) -> bytes:
        """Differs when the rows, their places or the picture's number of tokens differ."""
        found = hashlib.blake2b(np.ascontiguousarray(self.features).data, digest_size=32)
        if self.indices is not None:
            found.update(np.ascontiguousarray(self.indices).data)
        whole = self.indices is None
        found.update(f"{self.features.shape} {whole} {chunk.n_tokens} {chunk.n_pos} {self.positions}".encode())
        return found.digest()


@dataclass(frozen=True, eq=False)
class _Step:
    key: tuple[int, ...] | bytes
    chunk: _core.Chunk
    rows: ImageRows | None


def _steps(chunks: Sequence[_core.Chunk], images: Sequence[ImageRows], n_batch: int) -> list[_Step]:
    steps: list[_Step] = []
    waiting = iter(images)
    for chunk in chunks:
        if chunk.is_image:
            rows = next(waiting)
            steps.append(_Step(rows.digest(chunk), chunk, rows))
            continue
        tokens = chunk.tokens
        steps += [_Step(tuple(tokens[i : i + n_batch]), chunk, None) for i in range(0, len(tokens), n_batch)]
    return steps


def _saved_after(steps: Sequence[_Step]) -> int:
    """After how many steps a recurrent state is worth a copy: the last image, for what changes is the question; all but
    the last step where there is none."""
    images = [number for number, step in enumerate(steps[:-1], 1) if step.rows is not None]
    return images[-1] if images else len(steps) - 1


def _reusable(language: LanguageModel, steps: Sequence[_Step]) -> list[Done]:
    """Steps of the KV cache that begin this prompt, its last step excepted."""
    same: list[Done] = []
    for done, step in zip(language.record.steps, steps[:-1], strict=False):
        if done.key != step.key or not language.holds(done.start, done.ids):
            break
        same.append(done)
    if language.is_recurrent:
        state = language.record.state
        ends = [done.start + len(done.ids) for done in same]
        same = same[: ends.index(state.n_past) + 1] if state is not None and state.n_past in ends else []
    return same


def fill(
    language: LanguageModel,
    encoder: ImageEncoder,
    chunks: Sequence[_core.Chunk],
    images: Sequence[ImageRows],
    n_batch: int,
) -> int:
    """Put a prompt into the KV cache.

    Args:
        language: the language model.
        encoder: what `chunks` came from.
        chunks: text and images, in order.
        images: rows for each image chunk.
        n_batch: tokens of a batch.

    Returns:
        Cells of the prompt that were in use already: fewer than positions where kept image tokens leave gaps.

    Raises:
        NativeError: libllama refuses a batch; the cache is empty then.
    """
    steps = _steps(chunks, images, n_batch)
    same = _reusable(language, steps)
    n_same = same[-1].start + len(same[-1].ids) if same else 0
    if not (n_same and language.cut(n_same)):
        language.reset()  # forgets the record as well
        same, n_same = [], 0
    language.record.steps[:] = same
    language.record.surplus = same[-1].surplus if same else 0
    n_cells = n_same + language.record.surplus
    language.fit()
    saved_after = _saved_after(steps) if language.is_recurrent else 0
    try:
        for number, step in enumerate(steps[len(same) :], len(same)):
            start = language.n_past
            if number == saved_after > len(same):
                language.record.state = language.save()
            if step.rows is None:
                assert isinstance(step.key, tuple)
                language.prefill(step.key)
                ids = np.array(step.key, dtype=np.int32)
            else:
                assert isinstance(step.key, bytes)
                encoder.prefill(step.chunk, step.rows.features, step.rows.indices, step.rows.positions, n_batch)
                ids = image_ids(step.key, language.n_past - start)
                language.note(start, ids)
            language.record.steps.append(Done(step.key, ids, start, language.record.surplus))
    except BaseException:
        language.reset()  # a step may be half in the cache
        raise
    return n_cells
