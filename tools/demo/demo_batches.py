"""Batches for train_demo_model.py: a picture, some of its image tokens, and several questions about it side by side.

The questions of a picture share its tokens and do not see each other: each is a branch whose positions go on where the
image ends, as if it were asked alone. That is one pass over the image for several questions, and the same as asking
them one by one. Only answers are learnt. Prompt: the chat template of the checkpoint, with the image in front.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from emoji_scenes import CELL, SIZE, Question, Scene, Sprite
from emoji_scenes_hard import SCENE_KINDS

PATCH: Final = 16
SIDE: Final = SIZE // PATCH  #: patches of a side
N_PATCHES: Final = SIDE * SIDE
BEFORE: Final = "<|im_start|>user\n"
IGNORED: Final = -100  #: label of a token that is not learnt

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Example:
    """One picture, as arrays that a batch is made of.

    Attributes:
        pixels: uint8 (192, 192, 3).
        tokens: of all questions and answers, int64 (n,), after the image.
        labels: the next token where it belongs to an answer, else ``IGNORED``, int64 (n,).
        branch: number of the question that a token belongs to, int64 (n,).
        position: of the token after the image's last, int64 (n,).
        patches: for each object the patches that it covers; the rest of the cells count as nothing.
    """

    pixels: NDArray[np.uint8]
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    branch: NDArray[np.int64]
    position: NDArray[np.int64]
    patches: tuple[tuple[int, ...], ...]


def branch_tokens(tokenize: Tokenize, question: Question) -> tuple[list[int], list[int]]:
    """(tokens, labels) of one question and its answer after the image; labels are shifted by one."""
    asked = tokenize(f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
    answer = tokenize(f"{question.answer}<|im_end|>")
    tokens = asked + answer
    labels = [IGNORED] * (len(asked) - 1) + answer
    return tokens[:-1], labels  # the last token has nothing to predict


def object_patches(scene: Scene) -> tuple[tuple[int, ...], ...]:
    """For each object the patches in the middle of its cell; for scenes without cells, nothing."""
    per = CELL // PATCH
    inside = all(placed.row < SIZE // CELL and placed.column < SIZE // CELL for placed in scene.objects)
    if not inside:
        return ()
    return tuple(
        tuple((placed.row * per + i) * SIDE + placed.column * per + j for i in range(per) for j in range(per))
        for placed in scene.objects
    )


def make_example(
    rng: random.Random, sprite: Sprite, tokenize: Tokenize, kinds: Sequence[str], n_questions: int
) -> Example:
    """Draw a scene of a random kind and ask `n_questions` about it."""
    draw, ask = SCENE_KINDS[rng.choice(list(kinds))]
    scene = draw(rng, sprite)
    rows: list[tuple[int, int, int, int]] = []
    for number in range(n_questions):
        pairs = zip(*branch_tokens(tokenize, ask(rng, scene)), strict=True)
        rows += [(token, label, number, i) for i, (token, label) in enumerate(pairs)]
    tokens, labels, branch, position = np.asarray(rows, np.int64).T
    return Example(scene.pixels, tokens, labels, branch, position, object_patches(scene))


def keep_patches(rng: random.Random, example: Example, n_keep: int) -> NDArray[np.int64]:
    """`n_keep` patches in order, at random, at least one of each object where that is possible."""
    seen = {rng.choice(patches) for patches in example.patches}
    others = [patch for patch in range(N_PATCHES) if patch not in seen]
    kept = (rng.sample(sorted(seen), min(n_keep, len(seen))) + rng.sample(others, max(0, n_keep - len(seen))))[:n_keep]
    return np.asarray(sorted(kept), np.int64)


def collate(rng: random.Random, examples: Sequence[Example], n_keep: int, n_before: int, pad: int) -> dict[str, Any]:
    """One batch, as NumPy arrays; b pictures, k kept patches, n tokens after the image (padded), L = before + k + n.

    Args:
        examples: b of them.
        n_keep: image tokens that each keeps.
        n_before: tokens in front of the image.
        pad: a token to fill with; nothing looks at it.

    Returns:
        pixels uint8 (b, 192, 192, 3); patches (b, k); tokens, labels (b, n); positions (b, L);
        sees bool (b, L, L): which token (second axis) looks at which (third axis).
    """
    b, n = len(examples), max(len(example.tokens) for example in examples)
    shared = n_before + n_keep
    tokens, labels = np.full((b, n), pad, np.int64), np.full((b, n), IGNORED, np.int64)
    branch, position = np.full((b, n), -1, np.int64), np.zeros((b, n), np.int64)
    for i, example in enumerate(examples):
        size = len(example.tokens)
        tokens[i, :size], labels[i, :size] = example.tokens, example.labels
        branch[i, :size], position[i, :size] = example.branch, example.position
    positions = np.concatenate([np.broadcast_to(np.arange(shared), (b, shared)), shared + position], axis=1)
    causal = np.tri(shared + n, dtype=bool)
    sees = np.broadcast_to(causal, (b, shared + n, shared + n)).copy()
    sees[:, shared:, shared:] &= branch[:, :, None] == branch[:, None, :]
    return {
        "pixels": np.stack([example.pixels for example in examples]),
        "patches": np.stack([keep_patches(rng, example, n_keep) for example in examples]),
        "tokens": tokens,
        "labels": labels,
        "positions": positions,
        "sees": sees,
    }
