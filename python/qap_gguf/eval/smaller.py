"""The baseline "use a smaller picture": as many tokens as pruning keeps, all of them, of a picture that is scaled down.

Where the number of tokens follows the picture's size (Qwen-VL, Pixtral, LFM2-VL, the tiles of InternVL and LLaVA-NeXT),
the picture is scaled down until it fits. Where the model scales every picture up to the same tiles (SmolVLM), the
encoder is loaded again with a limit, which makes it cut fewer. An encoder of one size has neither: `pool` stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import numpy as np
from PIL import Image

from qap_gguf.errors import ConfigError
from qap_gguf.model import VisionModel
from qap_gguf.vision.images import Pixels, load_image

_SMALLEST: Final = 16  # pixels of a side
_STEP: Final = 2**-0.25
_HALVINGS: Final = 6


def fitting_size(size: tuple[int, int], n_keep: int, count: Callable[[tuple[int, int]], int]) -> tuple[int, int] | None:
    """The largest (width, height) of the same shape that becomes at most `n_keep` tokens; None where none is found.

    Args:
        size: of the picture.
        n_keep: most tokens, at least 1.
        count: tokens of a picture of a size; more pixels give more tokens, or as many.

    Example:
        >>> fitting_size((640, 320), 50, lambda size: size[0] * size[1] // 32**2)
        (323, 161)
    """

    def scaled(scale: float) -> tuple[int, int]:
        return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)

    if count(size) <= n_keep:
        return size
    too_large, fits = 1.0, _STEP
    while count(scaled(fits)) > n_keep:
        too_large, fits = fits, fits * _STEP
        if min(scaled(fits)) < _SMALLEST:
            return None
    for _ in range(_HALVINGS):
        middle = (too_large + fits) / 2
        if count(scaled(middle)) <= n_keep:
            fits = middle
        else:
            too_large = middle
    return scaled(fits)


class SmallerPictures:
    """Encodes pictures so that they become at most so many tokens; use it as a context manager.

    Args:
        model: a VisionModel.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._limited: tuple[int, VisionModel] | None = None

    def __enter__(self) -> SmallerPictures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def encode(self, image: Any, n_keep: int) -> Any:
        """The ImageEmbedding of a smaller picture.

        Args:
            image: what ``VisionModel.encode`` takes.
            n_keep: most tokens, at least 1.

        Raises:
            ConfigError: this model makes more tokens of every picture.
        """
        pixels = load_image(image)
        height, width = pixels.shape[:2]
        encoder = self._model._encoder
        size = fitting_size((width, height), n_keep, lambda size: int(encoder.count(size).n_tokens))
        if size is not None:
            return self._model.encode(_scaled(pixels, size))
        return self._with_limit(n_keep, int(encoder.count((width, height)).n_tokens)).encode(pixels)

    def _with_limit(self, n_keep: int, n_tokens: int) -> VisionModel:
        """The model with an encoder that makes at most `n_keep` tokens; the last one is kept."""
        if self._limited is not None and self._limited[0] == n_keep:
            return self._limited[1]
        self._close()
        settings = self._model._encoder.settings
        try:
            limited = VisionModel(
                self._model._encoder.path,
                self._model.language_model,
                device=settings["device"],
                n_threads=settings["n_threads"],
                flash_attn=settings["flash_attn"],
                resize=settings["resize"],
                max_image_tokens=n_keep,
            )
        except ConfigError as err:
            raise ConfigError(
                f"resize: expected a model that makes at most {n_keep} tokens of a smaller picture, got one that makes "
                f"more of every size ({n_tokens} of this one); use pool as the baseline there"
            ) from err
        self._limited = n_keep, limited
        return limited

    def _close(self) -> None:
        if self._limited is not None:
            self._limited[1].close()
        self._limited = None


def _scaled(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The picture at (width, height), by Pillow's bicubic filter, which minds the scale."""
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.ascontiguousarray(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)))
