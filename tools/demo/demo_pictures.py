"""Pictures as the packaged model sees them: what each patch shows, and which tokens stand for the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from demo_lessons import cells_of
from emoji_scenes import COLORS, EMOJI, GRID, SIZE, Scene

PATCH: Final = 16  #: pixels of a side
SIDE: Final = SIZE // PATCH  #: patches of a side
N: Final = SIDE * SIDE
ALL: Final = torch.arange(N)
MIDDLE: Final = torch.arange(N // 4, N - N // 4)  #: the patches of a wide picture that are not padding
_PADDING: Final = (122, 116, 104)  # llama.cpp's colour of padding
_GROUP: Final = 128  # channels that share a scale, as in PruneConfig's defaults
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


def _min_max(values: Any) -> Any:
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-12)


def total_score(sight: Sight) -> Any:
    """The package's score by its defaults, (b, n): alpha 0.7, error int4, outlier range.

    tests/parity/test_train_demo.py compares it with `qap_gguf.reference`.
    """
    tokens = sight.tokens.float()
    groups = torch.nn.functional.pad(tokens, (0, -tokens.shape[-1] % _GROUP)).unflatten(-1, (-1, _GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    error = (groups - scale * (groups / (scale + 1e-8)).round()).square().sum((-1, -2)).sqrt()
    outlier = tokens.amax(-1) - tokens.amin(-1)
    return 0.7 * _min_max(sight.attention.float()) + 0.15 * _min_max(error) + 0.15 * _min_max(outlier)


def covering(sight: Sight, k: int, spread: bool = False) -> Any:
    """Numbers of the `k` tokens that `select="coverage"` keeps, sorted, (b, k).

    Args:
        sight: of b pictures.
        k: at least 1, at most n.
        spread: add a random number to each score, so that no choice becomes a habit.
    """
    with torch.no_grad():
        scores = total_score(sight)
        if spread:
            scores = scores + _JITTER * torch.rand(scores.shape)
        weight = scores.argsort(-1).argsort(-1).float()[:, :, None] + 1
        near = F.normalize(sight.tokens.float(), dim=-1)
        near = near @ near.transpose(1, 2)
        rows = torch.arange(len(near))
        best, taken, kept = torch.zeros(scores.shape), torch.zeros(scores.shape, dtype=torch.bool), []
        for _ in range(k):
            gain = ((near - best[:, :, None]).clamp(min=0) * weight).sum(1).masked_fill(taken, -1)
            kept.append(gain.argmax(1))
            taken[rows, kept[-1]] = True
            best = torch.maximum(best, near[rows, :, kept[-1]])
    return torch.stack(kept, 1).sort(1).values
