"""Every exception that qap_gguf raises on purpose.

Each message is one line: what was expected, what came, what to do. All of them derive from :class:`QapError`, so one
``except`` clause catches them; each also derives from the built-in exception that a caller would expect.
The names are of this project's own design (docs/design.md).
"""

from __future__ import annotations

__all__ = [
    "ArrayError",
    "ConfigError",
    "ConvertError",
    "DataError",
    "ImageError",
    "ModelFileError",
    "NativeError",
    "PinError",
    "QapError",
    "UnsupportedError",
]


_LONGEST = 1500  # characters of a message


class QapError(Exception):
    """Base class of everything below.

    Example:
        >>> try:
        ...     raise ConfigError("alpha must be 0..1, got 2; choose a value in that range")
        ... except QapError as err:
        ...     print(err)
        alpha must be 0..1, got 2; choose a value in that range

    What a stranger's file says may be quoted in a message: line breaks become spaces, and what is very long is cut in
    the middle.
    """

    def __init__(self, message: object = "") -> None:
        text = " ".join(str(message).splitlines())
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST - 300]} ... {text[-300:]}"
        super().__init__(text)


class ConfigError(QapError, ValueError):
    """A setting of :class:`qap_gguf.PruneConfig`, or its use on this image, is outside its range."""


class ArrayError(QapError, ValueError):
    """A NumPy argument has the wrong dtype, shape or range, or holds NaN or infinity."""


class ModelFileError(QapError, ValueError):
    """A GGUF file is missing, cut short, of another kind, or belongs to another model."""


class ImageError(QapError, ValueError):
    """An image cannot be read, or has a shape or dtype that is not an RGB picture."""


class ConvertError(QapError, ValueError):
    """A checkpoint cannot be converted, or the output would overwrite something."""


class DataError(QapError, ValueError):
    """A file of questions for an evaluation cannot be read, or one of its lines is not as described."""


class UnsupportedError(QapError, ValueError):
    """The model at hand cannot give what was asked (class-token attention, gaps in positions, ...)."""


class NativeError(QapError, RuntimeError):
    """The native library reported a failure that has no better class."""


class PinError(QapError, ImportError):
    """The installed llama-cpp-python is not the one that this build was made for, or it was loaded too early."""
