"""Encode once: embeddings kept by what they were made from, unpruned but for an early drop inside the encoder.

The key is made from the decoded pixels and from all that the encoder's output depends on (:func:`encoder_identity`),
never from a name. What is kept is bounded in bytes; the entry that was used longest ago goes first. With a folder, the
embeddings outlive the process (:mod:`qap_gguf.vision.store`).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from qap_gguf import _core
from qap_gguf.arguments import check_integer
from qap_gguf.config import LEVELS, PruneConfig
from qap_gguf.runtime.load import library_folder
from qap_gguf.vision.embedding import ImageEmbedding, is_usable
from qap_gguf.vision.images import Pixels
from qap_gguf.vision.store import EmbeddingStore

_BLOCK = 1 << 22
_caches: weakref.WeakSet[EmbeddingCache] = weakref.WeakSet()


def _new_locks() -> None:
    """In a forked process: a thread that held a lock is not there to give it back."""
    for cache in list(_caches):
        cache._lock = threading.Lock()


os.register_at_fork(after_in_child=_new_locks)


@dataclass(frozen=True)
class CacheStats:
    """What a cache has done and holds.

    Attributes:
        hits: images found in memory.
        store_hits: images found in the folder.
        misses: images found nowhere.
        n_images: embeddings in memory.
        n_bytes: their size.
    """

    hits: int = 0
    store_hits: int = 0
    misses: int = 0
    n_images: int = 0
    n_bytes: int = 0

    def to_dict(self) -> dict[str, int]:
        """All fields, ready for JSON."""
        return asdict(self)


class EmbeddingCache:
    """Embeddings of images, by content; may be shared by several models and threads.

    Args:
        max_bytes: most bytes in memory; 0 keeps nothing there.
        folder: where embeddings are kept beyond the process, made if it is missing; None keeps them in memory only.
            Several processes may share it.
        max_folder_bytes: most bytes in the folder.

    Raises:
        ConfigError: a value has the wrong type or is outside its range, or the folder cannot be made.

    Example:
        >>> import qap_gguf as qap
        >>> cache = qap.EmbeddingCache(max_bytes=64 * 2**20)
        >>> with qap.VisionModel(cache=cache) as vlm:
        ...     same = vlm.encode(qap.packaged_model().sample) is vlm.encode(qap.packaged_model().sample)
        >>> same, cache.stats.hits, cache.stats.misses
        (True, 1, 1)
    """

    def __init__(
        self,
        max_bytes: int = 256 * 2**20,
        folder: str | os.PathLike[str] | None = None,
        *,
        max_folder_bytes: int = 4 * 2**30,
    ) -> None:
        check_integer("max_bytes", max_bytes, 0, 2**50)
        check_integer("max_folder_bytes", max_folder_bytes, 0, 2**50)
        self._max_bytes = max_bytes
        self._store = None if folder is None else EmbeddingStore(folder, max_folder_bytes)
        self._lock = threading.Lock()
        _caches.add(self)
        self._entries: OrderedDict[str, ImageEmbedding] = OrderedDict()
        self._n_bytes = 0
        self._counts = {"hits": 0, "store_hits": 0, "misses": 0}

    def __repr__(self) -> str:
        now = self.stats
        return f"EmbeddingCache({now.n_images} images, {now.n_bytes / 2**20:.1f} MiB, folder {self.folder})"

    @property
    def folder(self) -> Path | None:
        """Where embeddings are kept beyond the process."""
        return None if self._store is None else self._store.folder

    @property
    def stats(self) -> CacheStats:
        """Counts so far, and what is in memory now."""
        with self._lock:
            return CacheStats(**self._counts, n_images=len(self._entries), n_bytes=self._n_bytes)

    def get(self, key: str) -> ImageEmbedding | None:
        """The embedding of a key from :func:`image_key`, None where it is not kept."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self._counts["hits"] += 1
                return found
        stored = None if self._store is None else self._store.load(key)
        if stored is not None and not is_usable(stored.features):
            stored = None  # no encoder wrote that
        with self._lock:
            self._counts["misses" if stored is None else "store_hits"] += 1
            if stored is not None:
                self._keep(key, freeze(stored))
        return stored

    def put(self, key: str, image: ImageEmbedding) -> ImageEmbedding:
        """Keep an embedding; it comes back with arrays that cannot be written to, for many may share it."""
        image = freeze(image)
        with self._lock:
            self._keep(key, image)
        if self._store is not None:
            self._store.save(key, image)
        return image

    def clear(self) -> None:
        """Forget what is in memory; a folder stays as it is."""
        with self._lock:
            self._entries.clear()
            self._n_bytes = 0

    def _keep(self, key: str, image: ImageEmbedding) -> None:
        size = n_bytes(image)
        old = self._entries.pop(key, None)
        self._n_bytes -= 0 if old is None else n_bytes(old)
        if size > self._max_bytes:
            return
        self._entries[key] = image
        self._n_bytes += size
        while self._n_bytes > self._max_bytes:
            _, gone = self._entries.popitem(last=False)
            self._n_bytes -= n_bytes(gone)


def _arrays(image: ImageEmbedding) -> list[np.ndarray[Any, Any]]:
    values = (getattr(image, field.name) for field in fields(image))
    return [value for value in values if isinstance(value, np.ndarray)]


def n_bytes(image: ImageEmbedding) -> int:
    """Size of an embedding's arrays."""
    return sum(int(array.nbytes) for array in _arrays(image))


def freeze(image: ImageEmbedding) -> ImageEmbedding:
    """Forbid writing to an embedding's arrays."""
    for array in _arrays(image):
        array.flags.writeable = False
    return image


def file_stamp(path: str | os.PathLike[str]) -> tuple[str | int, ...]:
    """What tells a file from the one that takes its name later: real path, device, inode, time, size.

    Raises:
        OSError: there is no such file.
    """
    real = Path(path).resolve()
    stat = real.stat()
    return str(real), stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


def encoder_identity(
    mmproj: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    lasting: bool,
    loaded: tuple[str | int, ...] | None = None,
) -> str:
    """Names an encoder: equal names mean equal embeddings of equal pixels.

    Args:
        mmproj: its file.
        settings: what else its output depends on (device, flash attention, what is captured).
        lasting: for a folder that outlives the file's time stamps: the whole file is read and its content counts.
        loaded: :func:`file_stamp` from before the file was loaded; None takes it now. Where another file has the name
            by now, or none, the encoder in memory is nobody else's: its name comes never again.

    Example:
        >>> import qap_gguf as qap
        >>> file = qap.packaged_model().mmproj
        >>> cpu, gpu = (encoder_identity(file, {"device": d}, lasting=True) for d in ("CPU", "CUDA0"))
        >>> cpu == gpu
        False
    """
    stamp = file_stamp(mmproj) if loaded is None else loaded
    library = next(p for p in library_folder().iterdir() if p.name.startswith("libmtmd."))
    parts = {
        "file": _lasting_name(Path(mmproj), stamp) if lasting else stamp,
        "settings": dict(settings),
        "library": [_core.__version__, _core.upstream_version, library.stat().st_size, library.stat().st_mtime_ns],
        "switches": [_core.disabled(), _core.stock_encoder()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _lasting_name(path: Path, stamp: tuple[str | int, ...]) -> str:
    try:
        content = _content(path)
        if file_stamp(path) == stamp:
            return content
    except OSError:  # moved away or removed: the encoder is in memory
        pass
    return f"replaced {secrets.token_hex(16)}"


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def early_identity(identity: str, early: PruneConfig | None) -> str:
    """The name of an encoder that leaves tokens out by a config; the encoder's own for None.

    Example:
        >>> half = PruneConfig(encoder_keep=0.5)
        >>> early_identity("a", None), early_identity("a", half) == early_identity("a", half.replace(n_keep=9))
        ('a', True)
    """
    if early is None:
        return identity
    names = ("encoder_keep", "encoder_layer", "alpha", "error", "group_size", "outlier", "outlier_weight")
    chosen = [getattr(early, name) for name in names] + [early.semantic == "attention"]
    levels = [getattr(early, name) for name in LEVELS]
    return f"{identity} {json.dumps([levels, chosen if early.encoder_keep < 1 else None])}"


def image_key(pixels: Pixels, identity: str) -> str:
    """The key of a picture for an encoder: 64 hexadecimal digits.

    Example:
        >>> import numpy as np
        >>> white = np.full((2, 3, 3), 255, np.uint8)
        >>> image_key(white, "a") == image_key(white.copy(), "a") != image_key(white.reshape(3, 2, 3), "a")
        True
    """
    digest = hashlib.sha256(f"{identity} {pixels.shape} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
