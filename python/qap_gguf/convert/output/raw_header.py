"""Where the parts of a GGUF file lie, for those who copy a file and change a few of its bytes.

Facts: the layout of a GGUF file (gguf.h of ggml): magic, version, number of tensors, number of keys, the keys, one
entry for each tensor, padding up to general.alignment, data. A tensor's offset counts from the start of the data, so
the data can move as a whole. gguf-py says where each key begins and ends; the bytes between are never taken apart.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gguf

from qap_gguf.errors import ModelFileError

__all__ = ["COUNTS", "Key", "Layout", "Tensor", "cut", "pack_key", "pack_text", "read_layout"]

COUNTS = struct.Struct("<4sIQQ")  # magic, version, tensors, keys


@dataclass(frozen=True)
class Key:
    """A key: its name, where it begins and ends, and where the number of its value's type stands."""

    name: str
    begin: int
    end: int

    @property
    def kind(self) -> int:
        """Where the type and the value begin."""
        return self.begin + 8 + len(self.name.encode())


@dataclass(frozen=True)
class Tensor:
    """A tensor: `shape` in GGUF's order, `begin` and `nbytes` of its data in the file, ggml type as gguf-py has it."""

    name: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The parts of a file, in bytes from its start.

    Attributes:
        keys: in the file's order.
        tensors: in the file's order.
        entries: begin and end of the tensors' entries.
        data: begin of the data.
        alignment: of the data.
        size: of the file.
    """

    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    entries: tuple[int, int]
    data: int
    alignment: int
    size: int


def read_layout(path: Path) -> Layout:
    """The parts of a file that ggml has read already.

    Raises:
        ModelFileError: gguf-py, which is stricter in places, does not read it.
    """
    try:
        reader = gguf.GGUFReader(path)
        if reader.byte_order != "I":
            raise ValueError("big-endian")
    except Exception as err:  # gguf-py raises many kinds
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ModelFileError(
            f"expected a GGUF file that gguf-py reads, got {path} ({reason}); convert it anew"
        ) from err
    # Before the first key lie the counts, which gguf-py lists as fields of its own.
    keys = tuple(Key(f.name, *_span(f)) for f in reader.fields.values() if f.offset >= COUNTS.size)
    tensors = tuple(
        Tensor(t.name, tuple(int(n) for n in t.shape), int(t.data_offset), int(t.n_bytes)) for t in reader.tensors
    )
    spans = [_span(tensor.field) for tensor in reader.tensors]
    entries = (min(begin for begin, _ in spans), max(end for _, end in spans))
    return Layout(keys, tensors, entries, int(reader.data_offset), int(reader.alignment), path.stat().st_size)


def _span(field: gguf.ReaderField) -> tuple[int, int]:
    return field.offset, field.offset + sum(int(part.nbytes) for part in field.parts)


def cut(file: IO[bytes], begin: int, end: int) -> bytes:
    """The bytes from `begin` to `end`.

    Raises:
        ModelFileError: the file has become shorter.
    """
    file.seek(begin)
    piece = file.read(end - begin)
    if len(piece) != end - begin:
        raise ModelFileError(f"expected {end} bytes in {file.name}, got fewer: it was cut short meanwhile; start again")
    return piece


def pack_text(text: str) -> bytes:
    """A text as GGUF stores it.

    Example:
        >>> pack_text("ab")
        b'\\x02\\x00\\x00\\x00\\x00\\x00\\x00\\x00ab'
    """
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pack_key(name: str, kind: gguf.GGUFValueType, value: bytes) -> bytes:
    """One key and its value, which is packed already, as GGUF stores them."""
    return pack_text(name) + struct.pack("<I", kind) + value
