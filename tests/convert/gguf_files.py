"""Small GGUF files for tests, made byte by byte (any keys, alignment, tensors), and an independent look at them."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Key = tuple[str, bytes]  # name, and type and value as they stand in the file
Tensor = tuple[str, tuple[int, ...], bytes]  # name, shape in GGUF's order, float32 values


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


def f32(number: float) -> bytes:
    return struct.pack("<If", 6, number)


def f32_list(numbers: Sequence[float]) -> bytes:
    return array(6, [struct.pack("<f", number) for number in numbers])


def i32_list(numbers: Sequence[int]) -> bytes:
    return array(5, [struct.pack("<i", number) for number in numbers])


def build(path: Path, keys: Sequence[Key], tensors: Sequence[Tensor], alignment: int = 32) -> Path:
    """Write a file of F32 tensors."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    head += b"".join(string(name) + value for name, value in keys)
    data = b""
    for name, shape, raw in tensors:
        assert len(raw) == 4 * math.prod(shape), name
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path


def tensor(name: str, *shape: int) -> Tensor:
    """Some values, the same for the same name; GGUF's order of dimensions."""
    values = np.random.default_rng(len(name)).standard_normal(math.prod(shape)).astype("<f4")
    return name, shape, values.tobytes()


#: The smallest LLaVA that libmtmd loads: one CLIP layer of width 8, 16 patches, tokens of width 12.
LLAVA_KEYS: list[Key] = [
    ("general.architecture", text("clip")),
    ("general.name", text("smallest")),
    ("clip.has_vision_encoder", boolean(True)),
    ("clip.projector_type", text("mlp")),
    ("clip.use_gelu", boolean(False)),
    ("clip.vision.image_size", u32(28)),
    ("clip.vision.patch_size", u32(7)),
    ("clip.vision.embedding_length", u32(8)),
    ("clip.vision.feed_forward_length", u32(16)),
    ("clip.vision.projection_dim", u32(12)),
    ("clip.vision.block_count", u32(1)),
    ("clip.vision.feature_layer", i32_list([1])),
    ("clip.vision.attention.head_count", u32(2)),
    ("clip.vision.attention.layer_norm_epsilon", f32(1e-5)),
    ("clip.vision.image_mean", f32_list([0.5, 0.5, 0.5])),
    ("clip.vision.image_std", f32_list([0.5, 0.5, 0.5])),
]
CLASS_TOKEN = tensor("v.class_embd", 8)
LLAVA_TENSORS: list[Tensor] = [
    tensor("v.patch_embd.weight", 7, 7, 3, 8),
    tensor("v.position_embd.weight", 8, 17),
    *(tensor(f"v.blk.0.{name}.{part}", 8) for name in ("ln1", "ln2") for part in ("weight", "bias")),
    *(tensor(f"v.blk.0.attn_{name}.weight", 8, 8) for name in ("q", "k", "v", "out")),
    *(tensor(f"v.blk.0.attn_{name}.bias", 8) for name in ("q", "k", "v", "out")),
    tensor("v.blk.0.ffn_up.weight", 8, 16), tensor("v.blk.0.ffn_up.bias", 16),
    tensor("v.blk.0.ffn_down.weight", 16, 8), tensor("v.blk.0.ffn_down.bias", 8),
    tensor("mm.0.weight", 8, 12), tensor("mm.0.bias", 12), tensor("mm.2.weight", 12, 12), tensor("mm.2.bias", 12),
]  # fmt: skip


def with_key(name: str, value: bytes | None) -> list[Key]:
    """LLAVA_KEYS with another value of one key, or without it."""
    return [key for key in LLAVA_KEYS if key[0] != name] + ([] if value is None else [(name, value)])


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
