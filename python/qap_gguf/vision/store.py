"""Embeddings in a folder: one file for each, checked before use, shared by processes without a lock.

A file is a line that names the format, the SHA-256 of all after it, and a NumPy archive (npz) with the arrays and the
other fields as JSON. It is written under a temporary name and renamed when it is whole, so a reader sees a whole file
or none; of two writers of one key the last wins, with the same content. A file that is damaged, cut short or of
another format counts as missing and is removed: a hash that fits says nothing, for whoever can write into the folder
can make one, so every field is typed before it is used, and no array is larger than its file. Nothing in a file is
executed: pickles are refused. What is no regular file is not opened.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import threading
import warnings
import zipfile
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from qap_gguf.config import LEVELS
from qap_gguf.errors import ConfigError
from qap_gguf.files.atomic import replacing
from qap_gguf.files.regular import open_regular
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.thumbnail import MAX_BYTES as THUMBNAIL_BYTES
from qap_gguf.vision.tiles import Content, Piece

_MAGIC = b"qap_gguf embedding 8\n"
_SUFFIX = ".qapemb"
_DROPPED = ("dropped_total", "dropped_near")
_KEY = re.compile(r"[0-9a-f]{64}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # what is in a picture is nobody else's business


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
    arrays = _arrays(body)
    plain = json.loads(arrays.pop("plain").tobytes())
    if not isinstance(plain, dict) or plain.pop("key", None) != key:
        raise ValueError("the file of another key")
    return _embedding(arrays, plain)


def _arrays(body: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an archive as :func:`pack` writes it; each lies in it as it is, so none is larger than `body`."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(body):
                raise ValueError("packed arrays")
            data = io.BytesIO(archive.read(entry))
            if np.lib.format.read_magic(data) != (1, 0):
                raise ValueError("another format of arrays")
            shape, _, dtype = np.lib.format.read_array_header_1_0(data)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data.getvalue()) - data.tell():
                raise ValueError("an array of another size than its file")
            data.seek(0)
            found[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(data, allow_pickle=False)
    return found


def _embedding(arrays: dict[str, np.ndarray[Any, Any]], plain: dict[str, Any]) -> ImageEmbedding:
    """What :func:`pack` took apart, each field checked.

    Raises:
        ValueError: a field has another type, shape or name than an embedding's.
    """
    pieces = tuple(_piece(row) for row in _list(plain.pop("pieces")))
    n_tokens, n_rows = sum(piece.n_tokens for piece in pieces), sum(piece.n_rows for piece in pieces)
    for name, shape in (("features", (n_rows, None)), ("hidden", (n_tokens, None)),
                        ("attention", (n_tokens,)), ("received", (n_tokens,))):  # fmt: skip
        array = arrays.get(name)
        if array is None:
            if name == "features" or plain.pop(name, None) is not None:
                raise ValueError(f"{name}: no array")
            continue
        if array.dtype != np.float32 or array.ndim != len(shape) or array.shape[0] != shape[0] or 0 in array.shape:
            raise ValueError(f"{name}: {array.dtype} {array.shape}")
    width, height = (_count(n, 1) for n in _list(plain.pop("size"), 2))
    rows, columns = (_count(n) for n in _list(plain.pop("grid"), 2))
    seconds = plain.pop("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
        raise ValueError("seconds")
    n_planes = _count(plain.pop("n_planes"), 1)
    if arrays["features"].shape[1] % n_planes or rows * columns != n_tokens:
        raise ValueError("planes or grid")
    shown = arrays.get("thumbnail")
    if shown is None:
        if plain.pop("thumbnail", None) is not None:
            raise ValueError("thumbnail: no array")
    elif shown.dtype != np.uint8 or shown.ndim != 1 or len(shown) > THUMBNAIL_BYTES:
        raise ValueError("thumbnail")
    extra: Any = {"bytes_read": _count(plain.pop("bytes_read")), "n_planes": n_planes}
    for name in LEVELS:
        level = plain.pop(name)
        extra[name] = None if level is None else _count(level)
        if level is not None and level > 255:
            raise ValueError(name)
    _check_dropped(arrays, plain, pieces)
    names = ("attention", "received", "hidden", "thumbnail", *_DROPPED)
    if plain or set(arrays) - {"features", *names}:
        raise ValueError("other fields")
    signals: Any = {name: arrays.get(name) for name in names}
    whole = np.ascontiguousarray(arrays["features"])
    return ImageEmbedding(whole, (rows, columns), size=(width, height), seconds=seconds, pieces=pieces,
                          **signals, **extra)  # fmt: skip


def _check_dropped(arrays: dict[str, np.ndarray[Any, Any]], plain: dict[str, Any], pieces: tuple[Piece, ...]) -> None:
    """Scores and cosines of what an early drop took are those of the pieces, or not there."""
    counts = [len(piece.dropped_real) for piece in pieces]
    sizes = sum(counts), sum(count * piece.n_left for count, piece in zip(counts, pieces, strict=True))
    if all(arrays.get(name) is None and plain.pop(name, None) is None for name in _DROPPED):
        return
    for name, size in zip(_DROPPED, sizes, strict=True):
        array = arrays.get(name)
        if array is None or array.dtype != np.float32 or array.shape != (size,) or size == 0:
            raise ValueError(name)


def _piece(row: Any) -> Piece:
    n_tokens, n_columns, *lists, content = _list(row, 6)
    special, padding, dropped = (tuple(_count(n) for n in _list(numbers)) for numbers in lists)
    piece = Piece(_count(n_tokens), _count(n_columns), special, padding, dropped)
    for numbers, end in ((special, piece.n_rows), (padding, piece.n_tokens), (dropped, piece.n_tokens)):
        if list(numbers) != sorted(set(numbers)) or any(n >= end for n in numbers):
            raise ValueError("special rows, padding or dropped tokens")
    return piece if content is None else replace(piece, content=_content(content, piece))


def _content(value: Any, piece: Piece) -> Content:
    """A place that is on the piece's grid, but for the pixels beside it that make no token."""
    left, top, width, height = _list(value, 4)
    for start, length, whole in (
        (left, width, piece.n_columns),
        (top, height, piece.n_tokens / max(1, piece.n_columns)),
    ):
        if not (isinstance(start, float) and isinstance(length, float) and start >= 0 and length > 0):
            raise ValueError("no such place")
        if not start + length < whole + 1:
            raise ValueError("a place outside of the grid")
    return left, top, width, height


def _list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError("no such list")
    return value


def _count(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**40:
        raise ValueError("no such number")
    return value


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
            with open_regular(path) as file:
                data = file.read(self._max_bytes + 1)
            if len(data) > self._max_bytes:
                raise ValueError("larger than the folder may be")
            image = unpack(key, data)
            os.utime(path)
        except FileNotFoundError:
            return None
        except Exception as err:  # damage ends in any error of zipfile, NumPy or JSON
            if isinstance(err, OSError) and err.errno != errno.EINVAL:
                self._warn("read", err)
                return None
            with contextlib.suppress(OSError):  # read-only, or shared with somebody else
                path.unlink(missing_ok=True)
            return None
        return image

    def save(self, key: str, image: ImageEmbedding) -> None:
        """Store an embedding. A full or read-only disk is a warning: the answer does not depend on it."""
        try:
            data = pack(key, image)
            if len(data) > self._max_bytes:
                return
            with replacing(self.path(key)) as temporary, open(temporary, "xb", opener=_private) as file:
                file.write(data)
            self._make_room()
        except OSError as err:
            self._warn("write", err)

    def _make_room(self) -> None:
        with self._lock:
            rows: list[tuple[float, int, Path]] = []
            for entry in os.scandir(self.folder):
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another process removed it
                    continue
                if entry.name.endswith(_SUFFIX):
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
