"""A folder of embeddings into which a stranger can write: what is no embedding counts as missing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from qap_gguf.vision.store import _MAGIC, EmbeddingStore
from reuse.test_embedding_cache import KEYS, embedding


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", 2**20)


def forged(change: Callable[[dict[str, Any], dict[str, Any]], None], **settings: Any) -> bytes:
    """A file whose hash fits, made by whoever can write into the folder; `change` gets its plain fields and arrays."""
    image = embedding()
    plain: dict[str, Any] = {
        "key": KEYS[0], "grid": list(image.grid), "size": list(image.size), "seconds": image.seconds,
        "attention": None, "received": None, "hidden": None, "bytes_read": 0, "n_planes": 1,
        "skip_flat_tiles": None, "duplicates": None,
        "pieces": [
            [p.n_tokens, p.n_columns, list(p.special), list(p.padding), list(p.dropped), p.content]
            for p in image.pieces
        ],
    }  # fmt: skip
    arrays: dict[str, Any] = {"features": image.features}
    change(plain, arrays)
    buffer = io.BytesIO()
    save = np.savez_compressed if settings.get("packed") else np.savez
    text = plain.get("text") or json.dumps(plain).encode()
    save(buffer, plain=np.frombuffer(text, np.uint8), **arrays)
    for name, data in settings.get("entries", {}).items():
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(name, data)
    return sealed(buffer.getvalue())


def sealed(body: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(body).digest() + body


def huge(shape: tuple[int, ...]) -> bytes:
    """An array's header without the array."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


Edit = Callable[[dict[str, Any], dict[str, Any]], None]


def setting(field: str, value: Any) -> Edit:
    """An edit that gives a plain field another value."""
    return lambda plain, arrays: plain.update({field: value})


def without(field: str) -> Edit:
    """An edit that takes a plain field away."""

    def edit(plain: dict[str, Any], arrays: dict[str, Any]) -> None:
        del plain[field]

    return edit


def with_array(field: str, array: Any) -> Edit:
    """An edit that puts an array in place of a field."""

    def edit(plain: dict[str, Any], arrays: dict[str, Any]) -> None:
        plain.pop(field, None)
        arrays[field] = array

    return edit


def dropping(total: Any, near: Any) -> Edit:
    """An edit after which two of the nine tokens were dropped early."""

    def edit(plain: dict[str, Any], arrays: dict[str, Any]) -> None:
        plain["pieces"] = [[9, 3, [], [], [4, 6], None]]
        for name, array in (("dropped_total", total), ("dropped_near", near)):
            if array is None:
                plain[name] = None
            else:
                arrays[name] = array

    return edit


WRONG: list[Any] = ["x", -1, 1.5, None, True, [], {}, [[]], [1, 2, 3], ["a", "b"], 2**70, [1, None], {"a": 1}]
FIELDS = ("grid", "size", "seconds", "bytes_read", "n_planes", "pieces", "attention", "key", "duplicates")
DEEP = b"[" * 100_000 + b"]" * 100_000


def test_a_forged_file_is_one_that_is_read(store: EmbeddingStore) -> None:
    """What the others are made from."""
    store.path(KEYS[0]).write_bytes(forged(lambda plain, arrays: None))
    found = store.load(KEYS[0])
    assert found is not None
    np.testing.assert_array_equal(found.features, embedding().features)
    place = (0.0, 0.5, 3.25, 2.0)
    store.path(KEYS[0]).write_bytes(forged(setting("pieces", [[9, 3, [], [], [], place]])))
    found = store.load(KEYS[0])
    assert found is not None
    assert found.content == place
    store.path(KEYS[0]).write_bytes(forged(dropping(np.zeros(2, "f4"), np.zeros(14, "f4"))))
    found = store.load(KEYS[0])
    assert found is not None
    assert found.dropped_near is not None
    assert found.dropped_near.shape == (14,)


def test_fields_of_wrong_types_count_as_missing(store: EmbeddingStore) -> None:
    n_rows = embedding().features.shape[0]
    files = [
        forged(setting(field, value))
        for field in FIELDS for value in WRONG if not (field in ("attention", "duplicates") and value is None)
        and not (field in ("bytes_read", "n_planes") and value == 1) and not (field == "seconds" and value == 1.5)
    ]  # fmt: skip
    files += [forged(without(field)) for field in FIELDS if field != "attention"]
    lies = (
        [0, 0, 3, 3],
        [0.0, 0.0, 1e6, 3.0],
        [-1.0, 0.0, 3.0, 3.0],
        [0.0, 0.0, 0.0, 3.0],
        [0.0, float("nan"), 3.0, 3.0],
    )
    files += [forged(setting("pieces", [[9, 3, [], [], [], place]])) for place in ("x", [0.0] * 3, *lies)]
    for array in (
        np.zeros((n_rows, 4)), np.zeros((n_rows, 4, 1), "f4"), np.zeros((n_rows + 1, 4), "f4"),
        np.zeros((0, 4), "f4"), np.zeros((n_rows, 4), "c8"), np.array(["a"] * n_rows),
    ):  # fmt: skip
        files.append(forged(with_array("features", array)))
        files.append(forged(with_array("hidden", array)))
        files.append(forged(with_array("attention", array)))
    two, cells = np.zeros(2, "f4"), np.zeros(14, "f4")
    for total, near in (
        (two, None), (None, cells), (two, cells[:13]), (two[:1], cells), (two, cells.reshape(7, 2)),
        (two, cells.astype("f8")), (two.astype("i4"), cells), (two[:0], cells[:0]),
    ):  # fmt: skip
        files.append(forged(dropping(total, near)))
    files += [forged(with_array("dropped_total", two)), forged(setting("dropped_near", 3))]
    files += [
        forged(lambda plain, _: plain.update(other=1)),
        forged(lambda _, arrays: arrays.update(other=np.zeros(3))),
        forged(lambda _, arrays: arrays.pop("features")),
        forged(lambda plain, _: plain.update(text=DEEP)),
        forged(lambda plain, _: plain.update(text=b"3")),
        forged(lambda plain, _: plain.update(text=b"\xff")),
        forged(lambda _, arrays: arrays.pop("features"), entries={"features.npy": huge((10**12, 10**5))}),
        forged(lambda _, arrays: arrays.pop("features"), entries={"features.npy": huge((2**62, 4))}),
        forged(lambda _, arrays: arrays.pop("features"), entries={"features.npy": b"\x93NUMPY\x01\x00"}),
        forged(lambda _, arrays: arrays.update(features=np.zeros((2**22, 4), "f4")), packed=True),
        sealed(b""), sealed(b"PK"), sealed(b"\0" * 1000),
    ]  # fmt: skip
    assert len(files) > 100
    tracemalloc.start()
    for number, data in enumerate(files):
        store.path(KEYS[0]).write_bytes(data)
        assert store.load(KEYS[0]) is None, number
        assert not store.path(KEYS[0]).exists(), number
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26  # not what a header claims


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
@pytest.mark.parametrize("kind", ["pipe", "device", "random", "pipe behind a link", "folder", "loop", "nowhere"])
def test_what_is_no_file_counts_as_missing(store: EmbeddingStore, kind: str, tmp_path: Path) -> None:
    path, target = store.path(KEYS[0]), tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(target)
        aims = {"device": "/dev/zero", "random": "/dev/urandom", "loop": str(path), "nowhere": "/no/where"}
        path.symlink_to(aims.get(kind, str(target)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert store.load(KEYS[0]) is None
        store.save(KEYS[0], embedding())
        assert (store.load(KEYS[0]) is None) == (kind == "folder")
