"""Relabelled copies that are made in passing, once for each file, in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from qap_gguf import _core
from qap_gguf.convert.relabel.api import ORIGIN, relabel
from qap_gguf.convert.relabel.rules import has_mrope
from qap_gguf.errors import ConvertError
from qap_gguf.files.gguf import read_gguf
from qap_gguf.files.user_cache import user_folder

__all__ = ["cache_folder", "relabelled_copy"]


def cache_folder() -> Path:
    """The folder of the copies: ``$QAP_CACHE/relabelled``, else ``~/.cache/qap_gguf/relabelled``."""
    return user_folder("relabelled")


def relabelled_copy(model: str | os.PathLike[str], progress: Callable[[int, int, str], None] | None = None) -> Path:
    """A file of the same language model whose image tokens can keep their places.

    That is `model` itself if it has M-RoPE or is relabelled, else a copy in :func:`cache_folder`, made at the first
    call. A file that was replaced (its header, size or time differ) gets a new copy, which takes the old one's place.

    Args:
        model: a GGUF file.
        progress: called as progress(done, total, what), in tensors, while a copy is made.

    Raises:
        ModelFileError: no whole language model.
        ConvertError: it cannot be relabelled, or the copy cannot be written (no room on the disk, ...).
    """
    source = Path(model)
    info = read_gguf(source)
    if ORIGIN in info.metadata or has_mrope(info):
        return source
    place = hashlib.blake2b(str(source.resolve()).encode(), digest_size=4).hexdigest()
    folder = cache_folder()
    target = folder / f"{source.stem}-{place}-{_stamp(source)}.gguf"
    if target.is_file():
        return target
    try:
        relabel(source, target, progress=progress)
    except ConvertError:
        if not target.is_file():  # else another process made it meanwhile
            raise
    for old in folder.glob(f"{_literal(source.stem)}-{place}-*.gguf"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def _stamp(source: Path) -> str:
    """Differs when the file's header, size or time of change do."""
    status = source.stat()
    with source.open("rb") as file:
        found = hashlib.blake2b(file.read(_core.gguf_info(str(source))[2]), digest_size=8)
    found.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def _literal(name: str) -> str:
    """A name for glob() without a special meaning."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
