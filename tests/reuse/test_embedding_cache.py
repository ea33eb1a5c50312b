"""Encoded images are kept by content: bounded, shared, and on disk only when they are whole."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from dropin.children import python
from qap_gguf import _core
from qap_gguf.errors import ConfigError
from qap_gguf.files.atomic import temporary_name
from qap_gguf.vision.cache import encoder_identity, image_key, n_bytes
from qap_gguf.vision.store import _MAGIC, EmbeddingStore, pack, unpack

SAMPLE = qap.packaged_model().sample
KEYS = [f"{number:064x}" for number in range(8)]


def embedding(seed: int = 0, *, hidden: bool = False) -> qap.ImageEmbedding:
    rng = np.random.default_rng(seed)
    features, extra = rng.random((9, 16), np.float32), rng.random((9, 4), np.float32)
    return qap.ImageEmbedding(
        features, (3, 3), rng.random(9, np.float32), (30, 20), 0.25, None, extra if hidden else None
    )


def same(a: qap.ImageEmbedding | None, b: qap.ImageEmbedding) -> bool:
    assert a is not None
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("features", "attention", "received", "hidden")]
    arrays = all((x is None and y is None) or np.array_equal(x, y) for x, y in pairs)
    return arrays and (a.grid, a.size, a.seconds) == (b.grid, b.size, b.seconds)


SIZE = n_bytes(embedding())


def test_the_oldest_goes_first() -> None:
    cache = qap.EmbeddingCache(max_bytes=3 * SIZE + 5)
    for i in range(3):
        cache.put(KEYS[i], embedding(i))
    assert cache.get(KEYS[0]) is not None  # now 1 was used longest ago
    cache.put(KEYS[3], embedding(3))
    assert [cache.get(key) is None for key in KEYS[:4]] == [False, True, False, False]
    assert cache.stats == qap.CacheStats(hits=4, misses=1, n_images=3, n_bytes=3 * SIZE)
    cache.put(KEYS[3], embedding(4))
    assert cache.stats.n_bytes == 3 * SIZE
    cache.clear()
    assert (cache.stats.n_images, cache.stats.n_bytes) == (0, 0)


def test_bytes_on_both_sides_of_the_limit(tmp_path: Path) -> None:
    cache = qap.EmbeddingCache(max_bytes=SIZE)
    cache.put(KEYS[0], embedding())
    assert same(cache.get(KEYS[0]), embedding())
    on_disk = len(pack(KEYS[0], embedding()))
    for most in (on_disk, on_disk - 1):
        store = EmbeddingStore(tmp_path / str(most), most)
        store.save(KEYS[0], embedding())
        assert store.path(KEYS[0]).exists() == (most == on_disk)
    cache = qap.EmbeddingCache(max_bytes=SIZE - 1)
    assert same(cache.put(KEYS[0], embedding()), embedding())
    assert cache.get(KEYS[0]) is None


def test_shared_arrays_cannot_be_written() -> None:
    kept = qap.EmbeddingCache().put(KEYS[0], embedding())
    with pytest.raises(ValueError, match="read-only"):
        kept.features[0, 0] = 1.0


@pytest.mark.parametrize("bad", [{"max_bytes": -1}, {"max_bytes": 1.5}, {"max_folder_bytes": True}])
def test_bad_limits(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        qap.EmbeddingCache(**bad)


def test_keys_see_all_that_matters(tmp_path: Path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    other = pixels.copy()
    other[1, 2, 2] += 1
    keys = {image_key(p, i) for p in (pixels, other, pixels.reshape(3, 2, 3)) for i in ("a", "b")}
    assert len(keys) == 6

    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    moved = tmp_path / "b.gguf"
    moved.write_bytes(b"one")
    changed = tmp_path / "c.gguf"
    changed.write_bytes(b"two")
    lasting = [encoder_identity(path, {"device": "CPU"}, lasting=True) for path in (file, moved, changed)]
    assert lasting[0] == lasting[1] != lasting[2]
    before = encoder_identity(file, {}, lasting=False)
    assert before != encoder_identity(moved, {}, lasting=False)
    os.utime(file, ns=(1, 1))
    assert before != encoder_identity(file, {}, lasting=False)
    assert encoder_identity(file, {"flash_attn": True}, lasting=True) != lasting[0]


def test_the_same_pixels_in_another_file(tmp_path: Path) -> None:
    with Image.open(SAMPLE) as image:
        image.save(tmp_path / "copy.bmp")
    with qap.VisionModel(n_threads=1, n_ctx=64) as vlm:
        first = vlm.encode(SAMPLE)
        assert vlm.encode(tmp_path / "copy.bmp") is first
        assert vlm.encode(np.zeros((192, 192, 3), np.uint8)) is not first
        assert vlm.n_encodes == 2
        vlm.forget()
        assert np.array_equal(vlm.encode(SAMPLE.read_bytes()).features, first.features)
        assert vlm.n_encodes == 3


def test_ten_questions_one_encoder_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where native code begins, beside the handler's own count."""
    files, passes = qap.packaged_model(), []
    native = _core.Encoder.encode

    def hook(*args: Any) -> Any:
        passes.append(args)
        return native(*args)

    monkeypatch.setattr(_core.Encoder, "encode", hook)
    uri = "data:image/png;base64," + base64.b64encode(SAMPLE.read_bytes()).decode()
    with qap.ChatHandler(files.mmproj, qap.PruneConfig(n_keep=36)) as handler:
        llm = llama_cpp.Llama(
            str(files.model), chat_handler=handler, n_ctx=448, n_threads=1, n_threads_batch=1, verbose=False
        )
        for number in range(10):
            question = f"What is in row {number // 4 + 1}, column {number % 4 + 1}?"
            parts: Any = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
            llm.create_chat_completion([{"role": "user", "content": parts}], max_tokens=2)
            assert (handler.stats.n_reused > 36) == (number > 0)
        assert handler.n_encodes == len(passes) == 1
        assert (handler.cache.stats.hits, handler.cache.stats.misses) == (9, 1)
        llm.close()


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", 2**20)


def test_a_round_trip(store: EmbeddingStore) -> None:
    for number, image in enumerate((embedding(1), embedding(2, hidden=True))):
        store.save(KEYS[number], image)
        assert same(store.load(KEYS[number]), image)
    assert store.load(KEYS[5]) is None
    assert sorted(path.name for path in store.folder.iterdir()) == [key + ".qapemb" for key in KEYS[:2]]


def test_every_kind_of_damage_counts_as_missing(store: EmbeddingStore) -> None:
    whole = pack(KEYS[0], embedding())
    middle = len(whole) // 2
    older = re.sub(rb"\d", b"1", _MAGIC)
    assert older != _MAGIC
    damaged = [
        b"",
        whole[:-1],
        whole[:middle],
        whole + b"x",
        b"x" + whole,
        whole.replace(_MAGIC, older),
        *(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in (0, 25, 60, middle, len(whole) - 1)),
        pack(KEYS[1], embedding()),
    ]
    for data in damaged:
        store.path(KEYS[0]).write_bytes(data)
        assert store.load(KEYS[0]) is None
        assert not store.path(KEYS[0]).exists()
    assert same(unpack(KEYS[0], whole), embedding())


def test_a_pickle_in_a_file_is_not_run(store: EmbeddingStore) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, plain=np.array([{"key": KEYS[0]}], dtype=object))
    body = buffer.getvalue()
    store.path(KEYS[0]).write_bytes(_MAGIC + hashlib.sha256(body).digest() + body)
    assert store.load(KEYS[0]) is None


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    size = len(pack(KEYS[0], embedding()))
    store = EmbeddingStore(tmp_path, 3 * size + 200)
    left = temporary_name(store.path(KEYS[5]))
    left.write_bytes(b"from a process that died")
    for number, key in enumerate(KEYS[:3]):
        store.save(key, embedding())
        os.utime(store.path(key), (1000 + number, 1000 + number))
    assert store.path(KEYS[0]).stat().st_mode & 0o077 == 0  # nobody else reads what was in a picture
    assert store.load(KEYS[0]) is not None  # that counts as use
    store.save(KEYS[3], embedding())
    assert [store.path(key).exists() for key in KEYS[:4]] == [True, False, True, True]
    assert not left.exists()
    EmbeddingStore(tmp_path, size - 1).save(KEYS[4], embedding())
    assert not store.path(KEYS[4]).exists()


def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="folder"):
        qap.EmbeddingCache(folder=tmp_path / "file")
    cache = qap.EmbeddingCache(folder=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.warns(RuntimeWarning, match="cannot write"):
        cache.put(KEYS[0], embedding())
    cache.put(KEYS[1], embedding())  # said once
    assert same(cache.get(KEYS[0]), embedding())


WRITER = """
import sys
import numpy as np
import qap_gguf as qap
with qap.VisionModel(n_threads=1, n_ctx=64, cache=qap.EmbeddingCache(folder=sys.argv[1])) as vlm:
    image = vlm.encode(qap.packaged_model().sample)
    print(vlm.n_encodes, vlm.cache.stats.store_hits, image.features.astype("f8").sum())
"""


def test_the_next_process_does_not_encode(tmp_path: Path) -> None:
    words = []
    for _ in range(2):
        done = python(WRITER, tmp_path)
        assert done.returncode == 0, done.stderr
        words.append(done.stdout.split())
    assert [row[:2] for row in words] == [["1", "0"], ["0", "1"]]
    assert words[0][2] == words[1][2]


CROWD = """
import sys, time
from qap_gguf.vision.store import EmbeddingStore
import numpy as np, qap_gguf as qap
store = EmbeddingStore(sys.argv[1], int(sys.argv[2]))
keys = [f"{n:064x}" for n in range(8)]
def image(n):
    return qap.ImageEmbedding(np.full((50, 16), n, np.float32), (5, 10), None, (30, 20), 0.25)
until, rounds = time.monotonic() + 1.0, 0
while time.monotonic() < until:
    for n, key in enumerate(keys):
        store.save(key, image(n))
        found = store.load(keys[(n * 3 + 1) % 8])
        assert found is None or (found.features == (n * 3 + 1) % 8).all()
        rounds += 1
print(rounds)
"""


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """Both write, read and remove the same eight files; neither ever sees a part of one."""
    size = len(pack(KEYS[0], qap.ImageEmbedding(np.zeros((50, 16), np.float32), (5, 10), None, (30, 20), 0.25)))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(python(CROWD, tmp_path, str(5 * size)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.returncode for done in found] == [0, 0], [done.stderr for done in found]
    assert all(int(done.stdout) > 8 for done in found)
    assert not list(tmp_path.glob(".*"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 6 * size


def test_many_threads_share_a_cache() -> None:
    cache = qap.EmbeddingCache(max_bytes=4 * SIZE)
    wrong: list[str] = []

    def work(seed: int) -> None:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            for number, key in enumerate(KEYS):
                found = cache.get(key)
                if found is not None and not same(found, embedding(number)):
                    wrong.append(key)
                cache.put(KEYS[(number + seed) % 8], embedding((number + seed) % 8))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = cache.stats
    assert (stats.n_images, stats.n_bytes) == (4, 4 * SIZE)
