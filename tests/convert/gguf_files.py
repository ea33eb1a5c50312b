"""Small GGUF files for tests, made byte by byte (any keys, alignment, tensors), and an independent look at them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Key = tuple[str, bytes]  # name, and type and value as they stand in the file


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def u32(number: int) -> bytes:
    return struct.pack("<II", 4, number)


def boolean(value: bool) -> bytes:
    return struct.pack("<I?", 7, value)


def text(value: str) -> bytes:
    return struct.pack("<I", 8) + string(value)


def array(kind: int, items: Sequence[bytes]) -> bytes:
    return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)


def build(path: Path, keys: Sequence[Key], tensors: Sequence[tuple[str, bytes]], alignment: int = 32) -> Path:
    """Write a file of 1-D F32 tensors (their bytes a multiple of 4)."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    head += b"".join(string(name) + value for name, value in keys)
    data = b""
    for name, raw in tensors:
        head += string(name) + struct.pack("<IQIQ", 1, len(raw) // 4, 0, len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path


@dataclass(frozen=True)
class Parts:
    """A file taken apart without gguf-py or ggml: keys as raw bytes in order, tensor entries and data as they are."""

    keys: list[Key]
    entries: bytes
    data: bytes


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _value_size(raw: bytes, at: int, kind: int) -> int:
    if kind == 8:
        return int(8 + struct.unpack_from("<Q", raw, at)[0])
    if kind == 9:
        sub, count = struct.unpack_from("<IQ", raw, at)
        size = 12
        for _ in range(count):
            size += _value_size(raw, at + size, sub)
        return size
    return _SIZES[kind]


def take_apart(path: Path) -> Parts:
    raw = path.read_bytes()
    magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", raw)
    assert (magic, version) == (b"GGUF", 3)
    at, keys, alignment = 24, [], 32
    for _ in range(n_keys):
        (length,) = struct.unpack_from("<Q", raw, at)
        name = raw[at + 8 : at + 8 + length].decode()
        at += 8 + length
        (kind,) = struct.unpack_from("<I", raw, at)
        end = at + 4 + _value_size(raw, at + 4, kind)
        keys.append((name, raw[at:end]))
        if name == "general.alignment":
            (alignment,) = struct.unpack_from("<I", raw, at + 4)
        at = end
    begin = at
    for _ in range(n_tensors):
        (length,) = struct.unpack_from("<Q", raw, at)
        (n_dims,) = struct.unpack_from("<I", raw, at + 8 + length)
        at += 8 + length + 4 + 8 * n_dims + 4 + 8
    data = at + -at % alignment
    assert not any(raw[at:data])
    return Parts(keys, raw[begin:at], raw[data:])
