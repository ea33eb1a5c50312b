"""Pictures as the packaged model sees them: what each patch shows, and which tokens stand for the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

import qap_gguf as qap
from demo_lessons import cells_of
from emoji_scenes import COLORS, EMOJI, GRID, SIZE, Scene
from tiny_checkpoint import PATCH, SIDE

N: Final = SIDE * SIDE
ALL: Final = torch.arange(N)
MIDDLE: Final = torch.arange(N // 4, N - N // 4)  #: the patches of a wide picture that are not padding
_PADDING: Final = (122, 116, 104)  # llama.cpp's colour of padding
_JITTER: Final = 0.2


class Sight(NamedTuple):
    """What a tower makes of b pictures.

    Attributes:
        tokens: projected, (b, n, d).
        attention: of the class token to the patches in the last layer, mean over heads, (b, n).
    """

    tokens: Any
    attention: Any


def padded(scene: Scene) -> Scene:
    """A wide scene as the model sees it, with padding above and below; others as they are."""
    missing = SIZE - len(scene.pixels)
    if not missing:
        return scene
    pixels = np.empty((SIZE, SIZE, 3), np.uint8)
    pixels[:] = _PADDING
    pixels[missing // 2 : SIZE - missing // 2] = scene.pixels
    return replace(scene, pixels=pixels)


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """What each patch shows: the number of an emoji plus 1, or 0 where nearly all of it is not an object; (144,)."""
    scene = padded(scene)
    far = np.abs(scene.pixels.astype(np.int16) - np.array(COLORS[scene.background])).max(-1) > 24
    share = far.reshape(SIDE, PATCH, SIDE, PATCH).mean((1, 3)).reshape(-1)
    in_cell = np.zeros(GRID * GRID, np.int64)
    for placed in scene.objects:
        in_cell[placed.cell] = EMOJI.index(placed.emoji) + 1
    return np.where(share > 0.12, in_cell[cells_of(SIDE).numpy()], 0)


def apart(tokens: Any, labels: Any, cells: Any) -> tuple[Any, Any]:
    """How little the patches of one thing are alike, 0 to 1: (mean of backgrounds, mean of objects).

    1 less the square of the length of their mean direction: a thing whose patches are alike needs few tokens.

    Args:
        tokens: (b, n, d).
        labels: of ``patch_labels``, int64 (b, n).
        cells: of the patches, (n,).
    """
    thing = F.one_hot(torch.where(labels > 0, cells + 1, 0), GRID * GRID + 1).float()
    n_patches = thing.sum(1)
    direction = thing.transpose(1, 2) @ F.normalize(tokens.float(), dim=-1) / n_patches.clamp(min=1)[..., None]
    found = 1 - direction.square().sum(-1)
    return found[:, 0].mean(), found[:, 1:][n_patches[:, 1:] > 1].mean()


def total_score(sight: Sight) -> Any:
    """The package's score of each token by its defaults, float32 (b, n)."""
    return torch.from_numpy(np.stack([qap.score(x, semantic=a).total for x, a in zip(*_arrays(sight), strict=True)]))


def covering(sight: Sight, k: int, spread: bool = False) -> Any:
    """Numbers of the `k` tokens that `select="coverage"` keeps, sorted, int64 (b, k).

    Args:
        sight: of b pictures.
        k: at least 1, at most n.
        spread: add a random number to each score, so that no choice becomes a habit.
    """
    scores = total_score(sight)
    if spread:
        scores = scores + _JITTER * torch.rand(scores.shape)
    tokens, _ = _arrays(sight)
    kept = [qap.select(s, k, x, "coverage") for s, x in zip(scores.numpy(), tokens, strict=True)]
    return torch.from_numpy(np.stack(kept).astype(np.int64))


def _arrays(sight: Sight) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    tokens, attention = (np.ascontiguousarray(x.detach().float().numpy()) for x in sight)
    return tokens, attention
