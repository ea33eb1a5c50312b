"""A video as rows: a row for each frame, and the tokens of all frames shared by what is new in each.

Exact is the number of tokens of each frame, which is known before it is encoded. Ours is the rule: a frame's share is
its novelty (vision/video.py), at least FLOOR, over the mean of all frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qap_gguf.batch.rows import Given
from qap_gguf.vision.video import Frame, frames, novelty

#: The least that counts as new in a frame: a still picture keeps an eighth of what a cut does.
FLOOR: Final = 0.125


def shares(new: Sequence[float]) -> list[float]:
    """How many tokens each frame keeps, as a multiple of the mean.

    Args:
        new: the novelty of each frame, in [0, 1].

    Returns:
        Numbers above 0 whose mean is 1.

    Example:
        >>> shares([1.0, 0.0, 0.0, 1.0])
        [1.7777777777777777, 0.2222222222222222, 0.2222222222222222, 1.7777777777777777]
    """
    weights = [max(value, FLOOR) for value in new]
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights]


def novelties(path: Path, every: float) -> list[float]:
    """The novelty of each frame; reads the video once, two frames in memory."""
    found: list[float] = []
    before: Frame | None = None
    for _, frame in frames(path, every):
        found.append(novelty(before, frame))
        before = frame
    return found


def frame_rows(path: Path, name: str, every: float, new: Sequence[float]) -> Iterator[Given]:
    """A row for each frame: its id is the video's name, "@", and the seconds."""
    for (seconds, frame), share in zip(frames(path, every), shares(new), strict=False):
        yield Given({"image": frame, "id": f"{name}@{seconds:.2f}"}, name=name, share=share)
