"""`annotate`: only the qap.* keys of an mmproj file change, and a failure leaves everything as it was."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qap_gguf as qap
from convert import gguf_files as files
from convert.gguf_files import CLASS_TOKEN, LLAVA_KEYS, LLAVA_TENSORS, build, take_apart, with_key
from qap_gguf.errors import ConfigError, ConvertError, ModelFileError
from qap_gguf.files.gguf import read_gguf

PACKAGED = qap.packaged_model()

numbers = st.sampled_from([(0, "<B"), (1, "<b"), (2, "<H"), (3, "<h"), (4, "<I"), (5, "<i"), (10, "<Q"), (11, "<q")])
names = st.text("abcdefghijklmnopqrstuvwxyz._0123456789\u00e9", min_size=1, max_size=24)


@st.composite
def values(draw: st.DrawFn) -> bytes:
    """A value of any GGUF type, as its bytes with the type in front."""
    code, form = draw(numbers)
    number = st.integers(0, 100).map(lambda n: struct.pack(form, n))
    strings = st.text(max_size=12).filter(lambda s: "\0" not in s).map(files.string)
    kinds: st.SearchStrategy[bytes] = st.one_of(
        number.map(lambda raw: struct.pack("<I", code) + raw),
        strings.map(lambda raw: struct.pack("<I", 8) + raw),
        st.floats(width=32).map(lambda x: struct.pack("<If", 6, x)),
        st.floats().map(lambda x: struct.pack("<Id", 12, x)),
        st.booleans().map(files.boolean),
        st.lists(number, max_size=5).map(lambda items: files.array(code, items)),
        st.lists(strings, max_size=5).map(lambda items: files.array(8, items)),
    )
    return draw(kinds)


configs = st.builds(
    qap.PruneConfig,
    keep_ratio=st.sampled_from([0.1, 0.125, 1.0]),
    n_keep=st.one_of(st.none(), st.integers(1, 16)),
    alpha=st.one_of(st.just("dynamic"), st.sampled_from([0.0, 0.1, 0.7, 1.0])),
    error=st.sampled_from(["int4", "q4_0"]),
    semantic=st.sampled_from(["auto", "cls", "text", "attention", "none"]),
    select=st.sampled_from(["topk", "dpp", "random"]),
)


@settings(max_examples=60, deadline=None)
@given(
    extra=st.lists(st.tuples(names, values()), max_size=8, unique_by=lambda key: key[0]),
    old=st.one_of(st.none(), configs),
    new=st.one_of(st.none(), configs),
    place=st.integers(0, 20),
    alignment=st.sampled_from([8, 32, 64, 256]),
    tensors=st.lists(st.binary(min_size=4, max_size=80).map(lambda raw: raw[: len(raw) // 4 * 4]), max_size=4),
    tail=st.binary(max_size=5),
)
def test_only_our_keys_change(
    tmp_path_factory: pytest.TempPathFactory,
    extra: list[files.Key],
    old: qap.PruneConfig | None,
    new: qap.PruneConfig | None,
    place: int,
    alignment: int,
    tensors: list[bytes],
    tail: bytes,
) -> None:
    folder = tmp_path_factory.mktemp("annotate")
    rest = [key for key in extra if not key[0].startswith(("clip.", "qap", "general."))]
    keys = [*LLAVA_KEYS, ("general.alignment", files.u32(alignment)), *rest]
    extras = [(f"t{i}", (len(raw) // 4,), raw) for i, raw in enumerate(tensors)]
    listed = [CLASS_TOKEN, *LLAVA_TENSORS, *extras]
    plain = build(folder / "plain.gguf", keys, listed, alignment)
    # What annotate wrote counts as an old file too, with our keys wherever a file may have them.
    own = [] if old is None else take_apart(qap.annotate(plain, folder / "own.gguf", old)).keys[len(keys) :]
    mixed = keys[:place] + own + keys[place:]
    before = build(folder / "before.gguf", mixed, listed, alignment)
    before.write_bytes(before.read_bytes() + tail)

    path = qap.annotate(before, folder / "after.gguf", new)
    had, got = take_apart(before), take_apart(path)
    assert (got.entries, got.data) == (had.entries, had.data)
    kept = [key for key in had.keys if not key[0].startswith("qap.")]
    assert got.keys[: len(kept)] == kept == keys
    assert [name for name, _ in got.keys[len(kept) :]] == ([] if new is None else list(new.to_metadata()))
    assert qap.PruneConfig.from_metadata(read_gguf(path).metadata) == new
    again = qap.annotate(path, folder / "again.gguf", None)
    assert again.read_bytes() == plain.read_bytes() + tail


def test_the_packaged_file_there_and_back(tmp_path: Path) -> None:
    path = qap.annotate(PACKAGED.mmproj, tmp_path / "new" / "a.gguf", qap.PruneConfig(n_keep=18))
    with qap.VisionModel(path, PACKAGED.model, n_threads=1) as vlm:
        assert vlm.file_config == qap.PruneConfig(n_keep=18)
    assert qap.annotate(path, path, qap.PruneConfig(n_keep=7, alpha="dynamic"), force=True) == path
    assert qap.PruneConfig.from_metadata(read_gguf(path).metadata) == qap.PruneConfig(n_keep=7, alpha="dynamic")
    qap.annotate(path, path, None, force=True)
    assert path.read_bytes() == PACKAGED.mmproj.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["a.gguf"]


def test_the_target_is_kept_without_force_and_by_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copy(PACKAGED.mmproj, tmp_path / "a.gguf"))
    with pytest.raises(ConvertError, match="force"):
        qap.annotate(path, path, qap.PruneConfig())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ConvertError, match="No space left"):
            qap.annotate(path, path, qap.PruneConfig(), force=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        with pytest.raises(ConvertError, match=r"^expected 5\.\d MB free in .*, got 1 bytes; free some space"):
            qap.annotate(path, path, qap.PruneConfig(), force=True)
    assert path.read_bytes() == PACKAGED.mmproj.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_memory_stays_small(tmp_path: Path) -> None:
    import tracemalloc

    size = 64 << 20
    big = build(tmp_path / "big.gguf", LLAVA_KEYS, [*LLAVA_TENSORS, ("t", (size // 4,), b"\7" * size)])
    tracemalloc.start()
    path = qap.annotate(big, tmp_path / "out.gguf", qap.PruneConfig())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > size
    assert peak < size / 4


@pytest.mark.parametrize(
    ("keys", "config", "error", "words"),
    [
        (with_key("general.architecture", files.text("llama")), {}, ModelFileError, "expected an mmproj file"),
        (with_key("clip.has_vision_encoder", None), {}, ModelFileError, "expected a vision encoder"),
        (LLAVA_KEYS, {"semantic": "clip_text"}, ConfigError, "CLIP's text tower"),
        (LLAVA_KEYS, {"semantic": "cls"}, ConfigError, "class token"),
        (
            with_key("clip.vision.block_count", files.u32(2)),
            {},
            ModelFileError,
            r"libmtmd loads, got a refusal .*blk\.1",
        ),
        (with_key("clip.projector_type", files.text("new")), {}, ModelFileError, r"a\.gguf"),
    ],
)
def test_a_file_that_cannot_have_these_defaults(
    tmp_path: Path, keys: list[files.Key], config: dict[str, object], error: type[Exception], words: str
) -> None:
    path = build(tmp_path / "a.gguf", keys, LLAVA_TENSORS)
    with pytest.raises(error, match=words) as caught:
        qap.annotate(path, tmp_path / "b.gguf", qap.PruneConfig.from_dict(config))
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_damaged_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path / "whole.gguf", LLAVA_KEYS, LLAVA_TENSORS).read_bytes()
    broken = tmp_path / "broken.gguf"
    for length in [0, 3, 10, 24, 60, len(whole) - 80, len(whole) - 17]:
        broken.write_bytes(whole[:length])
        with pytest.raises(ModelFileError) as caught:
            qap.annotate(broken, tmp_path / "out.gguf", None)
        assert "\n" not in str(caught.value)
    odd = build(tmp_path / "odd.gguf", [*LLAVA_KEYS, ("x", files.text("y"))], LLAVA_TENSORS)
    broken.write_bytes(odd.read_bytes().replace(b"x\x08", b"\xff\x08"))
    with pytest.raises(ModelFileError, match="damaged"):
        qap.annotate(broken, tmp_path / "out.gguf", None)
    monkeypatch.setattr(gguf, "GGUFReader", {}.__getitem__)
    with pytest.raises(ModelFileError, match=r"gguf-py reads.*KeyError"):
        qap.annotate(odd, tmp_path / "out.gguf", None)
    assert not (tmp_path / "out.gguf").exists()
