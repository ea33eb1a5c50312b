"""Writes, changes or removes the `qap.*` keys of an mmproj file that exists; every other byte is copied.

Facts: the layout of a GGUF file (gguf.h of ggml): magic, version, number of tensors, number of keys, the keys, one
entry for each tensor, padding up to general.alignment, data. A tensor's offset counts from the start of the data, so
the data can move as a whole. gguf-py says where each key begins and ends; the bytes between are never taken apart.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gguf

from qap_gguf import _core
from qap_gguf.config import METADATA_TYPES, PruneConfig
from qap_gguf.convert.mmproj_header import mmproj_facts
from qap_gguf.convert.output.disk_space import require_space, writing
from qap_gguf.convert.output.writer import OutputFolder
from qap_gguf.errors import ConfigError, ModelFileError, UnsupportedError
from qap_gguf.files.gguf import GgufInfo, check_vision, read_gguf

__all__ = ["annotate"]

_PREFIX = "qap."
_COUNTS = struct.Struct("<4sIQQ")  # magic, version, tensors, keys
_STEP = 4 << 20  # bytes that are copied at once


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a file lie, in bytes from its start."""

    keys: list[tuple[int, int]]  # begin and end of each key that is not ours, in the file's order
    tensors: tuple[int, int]  # begin and end of the tensors' entries
    data: int
    alignment: int


def annotate(src: str | Path, out: str | Path, prune: PruneConfig | None, *, force: bool = False) -> Path:
    """Copies the mmproj file `src` to `out` with `prune` as its pruning defaults; None removes the defaults.

    All other keys keep their bytes and their order, all tensors theirs. The `qap.*` keys come last. `out` may be `src`
    (with force): the file is replaced in one step when the new one is whole.

    src: an mmproj file with a vision encoder. out: the file to write, in a folder that exists or can be made.
    prune: stored as the defaults of whoever loads the file; `seed` is not among them.
    force: replace `out` if it is there.

    Returns `out`. Memory stays at some MB, whatever the size of the file. Raises ModelFileError if `src` is no whole
    mmproj file, ConfigError or UnsupportedError if its model cannot have these defaults, ConvertError if `out` cannot
    be written; then `out` is as it was.

    Example:
        >>> import tempfile
        >>> import qap_gguf as qap
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = qap.annotate(qap.packaged_model().mmproj, f"{folder}/new.gguf", qap.PruneConfig(n_keep=18))
        ...     qap.PruneConfig.from_metadata(read_gguf(path).metadata).n_keep
        18
    """
    source, target = Path(src), Path(out)
    info = read_gguf(source)
    _check(info, prune)
    layout = _layout(source)
    own = [] if prune is None else [_key(name, item) for name, item in prune.to_metadata().items()]
    with OutputFolder(target.parent, force) as folder:
        folder.check(target)
        size = source.stat().st_size
        require_space(folder.folder, size + sum(map(len, own)) + layout.alignment)
        new = folder.temp(target)
        with writing(folder.folder), source.open("rb") as old, new.open("wb") as file:
            for piece in _pieces(old, layout, own, size):
                file.write(piece)
        if prune is not None:
            _check_loads(new, source)
        new.chmod(source.stat().st_mode & 0o777)
        folder.commit((new, target))
    return target


def _check(info: GgufInfo, prune: PruneConfig | None) -> None:
    """`info` is an mmproj with a vision encoder whose model can do what `prune` asks."""
    check_vision(info)
    if prune is None:
        return
    facts = mmproj_facts(info)
    if prune.semantic == "clip_text" and not facts.text_tower:
        raise ConfigError(
            f"semantic: expected CLIP's text tower in {info.path} for clip_text, found none; "
            "convert the model with clip_text=... (--clip-text), or choose another signal"
        )
    if prune.semantic == "cls" and not facts.class_token:
        raise ConfigError(
            f"semantic: expected a class token in {info.path} for cls, found none; choose attention, text or auto"
        )


def _check_loads(new: Path, source: Path) -> None:
    """libmtmd opens the file that was written, our keys included, and can prune its images."""
    try:
        why_not = _core.inspect_mmproj(str(new), None)["why_not"]
    except RuntimeError as err:
        reason = " ".join(str(err).split()).replace(str(new), str(source))
        raise ModelFileError(
            f"expected an mmproj that libmtmd loads, got a refusal ({reason}); convert it anew"
        ) from err
    if why_not:
        raise UnsupportedError(f"expected a model whose images can be pruned, got {source}: {why_not}")


def _layout(path: Path) -> _Layout:
    try:
        reader = gguf.GGUFReader(path)
    except Exception as err:  # ggml has read this file; gguf-py raises many kinds where it is stricter
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ModelFileError(
            f"expected a GGUF file that gguf-py reads, got {path} ({reason}); convert it anew"
        ) from err
    # Before the first key lie the counts, which gguf-py lists as fields of its own.
    keys = [field for field in reader.fields.values() if field.offset >= _COUNTS.size]
    tensors = [_span(tensor.field) for tensor in reader.tensors]
    return _Layout(
        keys=[_span(field) for field in keys if not field.name.startswith(_PREFIX)],
        tensors=(min(begin for begin, _ in tensors), max(end for _, end in tensors)),
        data=int(reader.data_offset),
        alignment=int(reader.alignment),
    )


def _span(field: gguf.ReaderField) -> tuple[int, int]:
    return field.offset, field.offset + sum(int(part.nbytes) for part in field.parts)


def _pieces(old: IO[bytes], layout: _Layout, own: list[bytes], size: int) -> Iterator[bytes]:
    """The new file from its start to its end."""
    magic, version, n_tensors, _ = _COUNTS.unpack(old.read(_COUNTS.size))
    written = 0
    for piece in (
        _COUNTS.pack(magic, version, n_tensors, len(layout.keys) + len(own)),
        *(_slice(old, begin, end) for begin, end in layout.keys),
        *own,
        _slice(old, *layout.tensors),
    ):
        written += len(piece)
        yield piece
    yield b"\0" * (-written % layout.alignment)
    for begin in range(layout.data, size, _STEP):
        yield _slice(old, begin, min(begin + _STEP, size))


def _slice(file: IO[bytes], begin: int, end: int) -> bytes:
    file.seek(begin)
    piece = file.read(end - begin)
    if len(piece) != end - begin:
        raise ModelFileError(f"expected {end} bytes in {file.name}, got fewer: it was cut short meanwhile; start again")
    return piece


def _key(name: str, item: Any) -> bytes:
    """One key and its value as GGUF stores them."""
    kind = METADATA_TYPES[name]
    if kind == "string":
        code, data = gguf.GGUFValueType.STRING, _text(item)
    elif kind == "f32":
        code, data = gguf.GGUFValueType.FLOAT32, struct.pack("<f", item)
    elif kind == "bool":
        code, data = gguf.GGUFValueType.BOOL, struct.pack("<?", item)
    else:
        code, data = gguf.GGUFValueType.UINT32, struct.pack("<I", item)
    return _text(name) + struct.pack("<I", code) + data


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
