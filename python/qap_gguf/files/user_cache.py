"""Where the package keeps what can be made again: ``$QAP_CACHE``, else ``~/.cache/qap_gguf``."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder(name: str) -> Path:
    """The folder of that name in the user's cache; it need not be there.

    Example:
        >>> user_folder("tried").name
        'tried'
    """
    chosen = os.environ.get("QAP_CACHE")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "qap_gguf") / name
