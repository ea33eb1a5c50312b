"""Embeddings in a folder: one file for each, checked before use, shared by processes without a lock.

A file is a line that names the format, the SHA-256 of all behind it, and a NumPy archive (npz) with the arrays and the
other fields as JSON. It is written under a name of its own and renamed when it is whole, so a reader sees a whole file
or none; of two writers of one key the last wins, with the same content. A file that is damaged, cut short or of
another format counts as missing and is removed. Nothing in a file is executed: pickles are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import threading
import time
import warnings
import zipfile
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np

from qap_gguf.errors import ConfigError
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.tiles import Piece

_MAGIC = b"qap_gguf embedding 4\n"
_SUFFIX = ".qapemb"
_PART = ".part-"
_STALE_S = 3600.0  # a part that old was left by a process that died
_KEY = re.compile(r"[0-9a-f]{64}")


def pack(key: str, image: ImageEmbedding) -> bytes:
    """The content of a file."""
    arrays: dict[str, Any] = {}
    plain: dict[str, Any] = {"key": key}
    for field in fields(image):
        value = getattr(image, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value
        else:
            plain[field.name] = value
    plain["pieces"] = [astuple(piece) for piece in image.pieces]
    buffer = io.BytesIO()
    np.savez(buffer, plain=np.frombuffer(json.dumps(plain).encode(), np.uint8), **arrays)
    body = buffer.getvalue()
    return _MAGIC + hashlib.sha256(body).digest() + body


def unpack(key: str, data: bytes) -> ImageEmbedding:
    """The embedding in a file's content.

    Raises:
        ValueError: it is damaged, of another format, or of another key.
    """
    start = len(_MAGIC) + 32
    body = data[start:]
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise ValueError("not a whole file of this format")
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        values: dict[str, Any] = {name: archive[name] for name in archive.files if name != "plain"}
        plain = json.loads(archive["plain"].tobytes())
    if plain.pop("key") != key:
        raise ValueError("the file of another key")
    pieces = plain.pop("pieces")
    values["pieces"] = tuple(
        Piece(n, columns, tuple(special), None if early is None else tuple(early), dropped)
        for n, columns, special, early, dropped in pieces
    )
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return ImageEmbedding(**values, **plain)


class EmbeddingStore:
    """A folder of embeddings, bounded in bytes; files that were used longest ago go first.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = Path(folder)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._warned = False
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (OSError, ValueError) as err:
            why = getattr(err, "strerror", None) or err
            raise ConfigError(f"folder: expected a folder, cannot make {str(folder)!r} ({why}); name another") from err

    def path(self, key: str) -> Path:
        """The file of a key."""
        assert _KEY.fullmatch(key), key
        return self.folder / (key + _SUFFIX)

    def load(self, key: str) -> ImageEmbedding | None:
        """What is stored for a key; None where there is nothing, or nothing whole."""
        path = self.path(key)
        try:
            data = path.read_bytes()
            image = unpack(key, data)
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as err:
            self._warn("read", err)
            return None
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
            return None
        return image

    def save(self, key: str, image: ImageEmbedding) -> None:
        """Store an embedding. A full or read-only disk is a warning: the answer does not depend on it."""
        try:
            data = pack(key, image)
            if len(data) > self._max_bytes:
                return
            number, name = tempfile.mkstemp(prefix=_PART, dir=self.folder)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(data)
                os.replace(name, self.path(key))
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._make_room()
        except OSError as err:
            self._warn("write", err)

    def _make_room(self) -> None:
        now = time.time()
        with self._lock:
            rows: list[tuple[float, int, Path]] = []
            for entry in os.scandir(self.folder):
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another process removed it
                    continue
                if entry.name.startswith(_PART) and now - stat.st_mtime > _STALE_S:
                    Path(entry.path).unlink(missing_ok=True)
                elif entry.name.endswith(_SUFFIX):
                    rows.append((stat.st_mtime, stat.st_size, Path(entry.path)))
            total = sum(size for _, size, _ in rows)
            for _, size, path in sorted(rows):
                if total <= self._max_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size

    def _warn(self, what: str, err: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"embeddings: cannot {what} in {self.folder} ({err.strerror or err}); they are kept in memory only",
                RuntimeWarning,
                stacklevel=2,
            )
