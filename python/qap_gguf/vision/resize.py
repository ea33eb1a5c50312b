"""How pictures come to the size that an encoder takes (docs/upstream.md): an mmproj gets it when it is loaded.

Stock llama.cpp letterboxes pictures with black for families that were trained on stretched ones (Qwen-VL, Gemma 3,
Pixtral, Mistral 3, LightOnOCR, InternVL's tiles). ``auto`` does as the model was trained.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from qap_gguf import _core
from qap_gguf.errors import ConfigError

RESIZES: Final = ("auto", "stretch", "pad")

_lock = threading.RLock()
_default = "auto"


def check_resize(mode: object) -> str:
    """`mode` if it is one of ``RESIZES``.

    Raises:
        ConfigError: it is none.
    """
    if mode not in RESIZES:
        raise ConfigError(f"resize: expected one of {', '.join(RESIZES)}, got {mode!r}; choose one of these")
    return str(mode)


def set_resize(mode: str) -> None:
    """How pictures are resized for every mmproj that is loaded from now on, by stock chat handlers too.

    Args:
        mode: "auto" (as the model was trained), "stretch" or "pad" (keep the aspect ratio, fill with a colour).

    Raises:
        ConfigError: another word.

    Example:
        >>> import qap_gguf as qap
        >>> qap.set_resize("pad")
        >>> qap.set_resize("auto")
    """
    global _default  # noqa: PLW0603 - one setting for the process is what it is
    mode = check_resize(mode)
    with _lock:
        _core.set_resize(mode)
        _default = mode


@contextlib.contextmanager
def loading(mode: str | None, *, force_family: bool = False) -> Iterator[None]:
    """What is loaded within the block resizes in this way; None leaves it to :func:`set_resize`.

    force_family: it may be pruned though its family was not compared with its original; False leaves it to
    ``QAP_FORCE_FAMILY``.
    """
    with _lock:
        if mode is not None:
            _core.set_resize(mode)
        _core.set_force_family(force_family)
        try:
            yield
        finally:
            _core.set_resize(_default)
            _core.set_force_family(False)


def default_resize() -> str:
    """The mode of the last :func:`set_resize`."""
    return _default
