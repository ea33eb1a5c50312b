"""Damage to GGUF files, seeded: bytes, counts, lengths, keys, types, shapes. Used by mutate.py and the tests.

Half of the kinds damage the bytes; the others write a file that ggml's reader accepts and that contradicts itself, for
which the file is taken apart (layout: docs/gguf.md of ggml) and put together anew with data of the right length.
"""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Callable

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
#: ggml type -> (numbers in a block, bytes of a block); those that a stranger may write
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2), 20: (32, 18), 23: (256, 136),
}  # fmt: skip
EXTREMES = (0, 1, 2, 3, 5, 7, 255, 4095, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
REALS = (0.0, -1.0, 1.0, 1e-30, 1e30, -1e30, float("nan"), float("inf"), float("-inf"))


@dataclasses.dataclass
class Key:
    """One key: its name, its type and its value as bytes, and where the value begins in the file."""

    name: bytes
    kind: int
    value: bytes
    at: int


@dataclasses.dataclass
class Tensor:
    """One row of the tensor table; ``at`` is where the row begins."""

    name: bytes
    dims: list[int]
    kind: int
    data: bytes
    at: int


class Gguf:
    """A GGUF file taken apart."""

    def __init__(self, data: bytes) -> None:
        self.whole = data
        self.version, n_tensors, n_keys = struct.unpack_from("<IQQ", data, 4)
        at = 24
        self.keys: list[Key] = []
        for _ in range(n_keys):
            name, at = self._string(at)
            (kind,) = struct.unpack_from("<I", data, at)
            begin = at + 4
            at = self._skip(begin, kind)
            self.keys.append(Key(name, kind, data[begin:at], begin))
        self.table = at
        rows: list[tuple[bytes, list[int], int, int, int]] = []
        for _ in range(n_tensors):
            row = at
            name, at = self._string(at)
            (n_dims,) = struct.unpack_from("<I", data, at)
            dims = list(struct.unpack_from(f"<{n_dims}Q", data, at + 4))
            kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * n_dims)
            at += 16 + 8 * n_dims
            rows.append((name, dims, kind, offset, row))
        self.end = at
        base = -(-at // 32) * 32
        self.tensors = [
            Tensor(name, dims, kind, data[base + offset : base + offset + n_bytes(dims, kind)], row)
            for name, dims, kind, offset, row in rows
        ]

    def _string(self, at: int) -> tuple[bytes, int]:
        (n,) = struct.unpack_from("<Q", self.whole, at)
        return self.whole[at + 8 : at + 8 + n], at + 8 + n

    def _skip(self, at: int, kind: int) -> int:
        if kind == STRING:
            return self._string(at)[1]
        if kind != ARRAY:
            return at + struct.calcsize("<" + SCALARS[kind])
        item, n = struct.unpack_from("<IQ", self.whole, at)
        at += 12
        if item != STRING:
            return at + int(n) * struct.calcsize("<" + SCALARS[item])
        for _ in range(n):
            at = self._string(at)[1]
        return at


def n_bytes(dims: list[int], kind: int) -> int:
    """Bytes of a tensor; rows are padded to whole blocks."""
    block, size = BLOCKS[kind]
    count = -(-dims[0] // block) * size
    for n in dims[1:]:
        count *= n
    return count


def write(keys: list[Key], tensors: list[Tensor], version: int = 3) -> bytes:
    """Keys and tensors as a file; data that is too short or long for a tensor's shape is repeated or cut."""
    out = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(keys))]
    for key in keys:
        out += [struct.pack("<Q", len(key.name)), key.name, struct.pack("<I", key.kind), key.value]
    offset, blobs = 0, []
    for tensor in tensors:
        size = n_bytes(tensor.dims, tensor.kind)
        out += [struct.pack("<Q", len(tensor.name)), tensor.name, struct.pack("<I", len(tensor.dims))]
        out += [struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims), struct.pack("<IQ", tensor.kind, offset)]
        blob = (tensor.data * (size // max(1, len(tensor.data)) + 1))[:size]
        padded = -(-size // 32) * 32
        blobs.append(blob + bytes(padded - size))
        offset += padded
    head = b"".join(out)
    return head + bytes(-len(head) % 32) + b"".join(blobs)


# --- damage to the bytes ---


def _put(whole: bytes, at: int, data: bytes) -> bytes:
    return whole[:at] + data + whole[at + len(data) :]


def _place(rng: random.Random, file: Gguf) -> int:
    """A byte of the header: of the counts, a key, or the tensor table, each as likely as the others."""
    where = rng.randrange(3)
    if where == 0:
        return rng.randrange(24)
    if where == 1:
        key = rng.choice(file.keys)
        begin = key.at - 12 - len(key.name)
        return rng.randrange(begin, key.at + min(len(key.value), 64))
    return rng.randrange(file.table, file.end)


def truncate(rng: random.Random, file: Gguf) -> bytes:
    """Cut anywhere, as often in the header as after it."""
    return file.whole[: rng.randrange(file.end if rng.random() < 0.5 else len(file.whole))]


def flip_bytes(rng: random.Random, file: Gguf) -> bytes:
    """One to eight bytes of the header become others."""
    whole = file.whole
    for _ in range(rng.choice((1, 1, 2, 8))):
        whole = _put(whole, _place(rng, file), bytes([rng.randrange(256)]))
    return whole


def flip_bit(rng: random.Random, file: Gguf) -> bytes:
    """One bit of the header."""
    at = _place(rng, file)
    return _put(file.whole, at, bytes([file.whole[at] ^ (1 << rng.randrange(8))]))


def flip_data(rng: random.Random, file: Gguf) -> bytes:
    """Bytes of the weights: any number may come of it, NaN among them."""
    whole = file.whole
    for _ in range(rng.choice((1, 16, 256))):
        at = rng.randrange(file.end, len(whole) - 8)
        whole = whole[:at] + rng.choice((rng.randbytes(4), b"\xff\xff\xff\x7f", b"\x00\x7e")) + whole[at + 4 :]
        whole = whole[: len(file.whole)]
    return whole


def lie_about_counts(rng: random.Random, file: Gguf) -> bytes:
    """Another number of tensors or keys."""
    n = rng.choice((0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1, len(file.tensors) + 1, len(file.keys) - 1))
    return _put(file.whole, rng.choice((8, 16)), struct.pack("<Q", n))


def lie_about_lengths(rng: random.Random, file: Gguf) -> bytes:
    """Another length of a text, a list, or a name in the tensor table."""
    n = rng.choice((0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1))
    texts = [key.at for key in file.keys if key.kind == STRING]
    lists = [key.at + 4 for key in file.keys if key.kind == ARRAY]
    names = [key.at - 12 - len(key.name) for key in file.keys] + [tensor.at for tensor in file.tensors]
    return _put(file.whole, rng.choice(rng.choice((texts, lists, names))), struct.pack("<Q", n))


def lie_in_the_table(rng: random.Random, file: Gguf) -> bytes:
    """Another number of dimensions, dimension, type or offset of a tensor, with nothing after it."""
    tensor = rng.choice(file.tensors)
    at = tensor.at + 8 + len(tensor.name)
    n_dims = len(tensor.dims)
    what = rng.randrange(4)
    if what == 0:
        return _put(file.whole, at, struct.pack("<I", rng.choice((0, 1, 2, 3, 4, 5, 2**31))))
    if what == 1:
        n = rng.choice((*EXTREMES, 2**40, 2**62, 2**63, 2**64 - 1))
        return _put(file.whole, at + 4 + 8 * rng.randrange(n_dims), struct.pack("<Q", n))
    if what == 2:
        return _put(file.whole, at + 4 + 8 * n_dims, struct.pack("<I", rng.choice((*range(45), 2**31))))
    offset = rng.choice((1, 32, 2**31, 2**40, 2**63, 2**64 - 32))
    return _put(file.whole, at + 8 + 8 * n_dims, struct.pack("<Q", offset))


# --- files that are well made and wrong ---


def _own_keys(file: Gguf) -> list[int]:
    """Keys that a loader may look at; the long lists are left to change_list."""
    return [i for i, key in enumerate(file.keys) if key.kind != ARRAY or len(key.value) < 4096]


def change_key(rng: random.Random, file: Gguf) -> bytes:
    """Another value of the same type."""
    keys = [dataclasses.replace(key) for key in file.keys]
    key = keys[rng.choice(_own_keys(file))]
    if key.kind == STRING:
        text = rng.choice(
            (b"", b"mlp", b"nonsense", b"llama", b"none", b"gemma3", b"resampler", b"\xff\x00\xfe", b"x" * 9999)
        )
        key.value = struct.pack("<Q", len(text)) + text
    elif key.kind == ARRAY:
        item, n = struct.unpack_from("<IQ", key.value)
        n = rng.choice((0, 1, 2, 3, 4, 600, n))
        key.value = struct.pack("<IQ", item, n) + b"".join(_number(rng, item) for _ in range(n))
    else:
        key.value = _number(rng, key.kind, key.value)
    return write(keys, file.tensors)


def _number(rng: random.Random, kind: int, old: bytes = b"") -> bytes:
    if kind == STRING:
        return struct.pack("<Q", 1) + b"a"
    code = SCALARS[kind]
    if code in "fd":
        return struct.pack("<" + code, rng.choice(REALS))
    if code == "?":
        return bytes([rng.choice((0, 1))])
    size = struct.calcsize("<" + code)
    n = rng.choice(EXTREMES)
    if old and rng.random() < 0.5:
        n = max(0, int.from_bytes(old, "little") + rng.choice((-1, 1, 2, 16)))
        n = rng.choice((n, n * 2, n // 2))
    return int(n % 2 ** (8 * size)).to_bytes(size, "little")


def change_key_type(rng: random.Random, file: Gguf) -> bytes:
    """The same key with a value of another type."""
    keys = [dataclasses.replace(key) for key in file.keys]
    key = keys[rng.choice(_own_keys(file))]
    key.kind = rng.choice([kind for kind in (*SCALARS, STRING, ARRAY) if kind != key.kind])
    if key.kind == ARRAY:
        item = rng.choice((*SCALARS, STRING))
        key.value = struct.pack("<IQ", item, 4) + b"".join(_number(rng, item) for _ in range(4))
    else:
        key.value = _number(rng, key.kind)
    return write(keys, file.tensors)


def drop_key(rng: random.Random, file: Gguf) -> bytes:
    """A key less."""
    keys = list(file.keys)
    del keys[rng.randrange(len(keys))]
    return write(keys, file.tensors)


def _own(file: Gguf, name: str) -> str:
    """The name of a llama's key as a language model of another architecture has it."""
    arch = next((key.value[8:].decode() for key in file.keys if key.name == b"general.architecture"), "clip")
    return name if arch == "clip" else name.replace("llama.", f"{arch}.", 1)


def add_key(rng: random.Random, file: Gguf) -> bytes:
    """A key that the loaders ask for and the file did without."""
    names = (
        "clip.vision.attention.head_count_kv", "clip.vision.attention.head_dim", "clip.vision.image_grid_pinpoints",
        "clip.vision.projector.scale_factor", "clip.has_audio_encoder", "clip.minicpmv_version", "qap.n_keep",
        "qap.version", "qap.alpha", "llama.expert_count", "llama.expert_used_count", "llama.rope.scaling.type",
        "llama.rope.scaling.factor", "llama.attention.sliding_window", "llama.nextn_predict_layers", "split.count",
        "general.alignment", "tokenizer.ggml.add_sep_token", "tokenizer.ggml.suppress_tokens", "qap_clip_text.version",
        "llama.attention.clamp_kqv", "llama.pooling_type", "llama.attention.causal", "clip.vision.feature_layer",
    )  # fmt: skip
    kind = rng.choice((4, 4, 4, 5, 6, 7, 2, STRING, ARRAY))
    name = _own(file, rng.choice(names)).encode()
    if kind == ARRAY:
        item, n = rng.choice((4, 5, 6)), rng.choice((0, 1, 2, 5))
        value = struct.pack("<IQ", item, n) + b"".join(_number(rng, item) for _ in range(n))
    elif kind == STRING:
        value = struct.pack("<Q", 4) + b"yarn"
    else:
        value = _number(rng, kind)
    return write([*[key for key in file.keys if key.name != name], Key(name, kind, value, 0)], file.tensors)


def change_list(rng: random.Random, file: Gguf) -> bytes:
    """A vocabulary of another length, or with one item twice."""
    keys = [dataclasses.replace(key) for key in file.keys]
    lists = [key for key in keys if key.kind == ARRAY]
    key = rng.choice(lists)
    item, n = struct.unpack_from("<IQ", key.value)
    size = 0 if item == STRING else struct.calcsize("<" + SCALARS[item])
    body = key.value[12:]
    if size:
        n = rng.choice((0, 1, n // 2, max(0, n - 1)))
        key.value = struct.pack("<IQ", item, n) + body[: n * size]
    else:
        keep, at = min(n, rng.choice((0, 1, 5, 20))), 0
        for _ in range(keep):
            at += 8 + struct.unpack_from("<Q", body, at)[0]
        tail = b"" if rng.random() < 0.5 else body[: 8 + struct.unpack_from("<Q", body)[0]] if n else b""
        key.value = struct.pack("<IQ", item, keep + bool(tail)) + body[:at] + tail
    return write(keys, file.tensors)


def _tensors(file: Gguf) -> list[Tensor]:
    return [dataclasses.replace(tensor, dims=list(tensor.dims)) for tensor in file.tensors]


def change_shape(rng: random.Random, file: Gguf) -> bytes:
    """A tensor of another shape: turned, longer, shorter, with more or fewer dimensions."""
    tensors = _tensors(file)
    tensor = rng.choice(tensors)
    block = BLOCKS[tensor.kind][0]
    what = rng.randrange(5)
    if what == 0:
        tensor.dims.reverse()
        tensor.dims[0] = -(-tensor.dims[0] // block) * block
    elif what == 1:
        at = rng.randrange(len(tensor.dims))
        step = block if at == 0 else 1
        tensor.dims[at] = max(step, tensor.dims[at] + rng.choice((-1, 1, 64)) * step)
    elif what == 2:
        tensor.dims = [tensor.dims[0], *tensor.dims[2:]]
    elif what == 3:
        tensor.dims = [*tensor.dims, rng.choice((1, 2))][:4]
    else:
        tensor.dims[rng.randrange(1, len(tensor.dims)) if len(tensor.dims) > 1 else 0] = block
    return write(file.keys, tensors)


def change_type(rng: random.Random, file: Gguf) -> bytes:
    """A tensor of the same shape with numbers of another type."""
    tensors = _tensors(file)
    tensor = rng.choice(tensors)
    kinds = [kind for kind, (block, _) in BLOCKS.items() if tensor.dims[0] % block == 0 and kind != tensor.kind]
    tensor.kind = rng.choice(kinds)
    return write(file.keys, tensors)


def swap_tensors(rng: random.Random, file: Gguf) -> bytes:
    """Two tensors under each other's name."""
    tensors = _tensors(file)
    one, two = rng.sample(tensors, 2)
    one.name, two.name = two.name, one.name
    return write(file.keys, tensors)


def drop_tensor(rng: random.Random, file: Gguf) -> bytes:
    """A tensor less."""
    tensors = list(file.tensors)
    del tensors[rng.randrange(len(tensors))]
    return write(file.keys, tensors)


def add_tensor(rng: random.Random, file: Gguf) -> bytes:
    """A tensor that loaders take where they find it."""
    names = (
        "v.patch_embd.bias", "v.post_ln.weight", "v.post_ln.bias", "mm.3.weight", "mm.1.weight", "mm.4.bias",
        "v.image_newline", "v.blk.0.attn_qkv.weight", "v.blk.1.attn_q_norm.weight", "v.blk.0.ffn_gate.weight",
        "v.blk.0.ls1.weight", "rope_freqs.weight", "output.weight", "blk.0.attn_q.bias", "blk.0.attn_qkv.weight",
        "blk.1.ffn_up.bias", "blk.0.attn_output.bias", "v.blk.2.attn_post_norm.weight", "v.norm_embd.weight",
    )  # fmt: skip
    name = rng.choice(names).encode()
    dims = [rng.choice((32, 64, 192, 256)) for _ in range(rng.choice((1, 1, 2)))]
    tensor = Tensor(name, dims, rng.choice((0, 0, 1, 8, 26)), rng.randbytes(64), 0)
    return write(file.keys, [*[t for t in file.tensors if t.name != name], tensor])


KINDS: tuple[Callable[[random.Random, Gguf], bytes], ...] = (
    truncate, flip_bytes, flip_bit, flip_data, lie_about_counts, lie_about_lengths, lie_in_the_table, change_key,
    change_key_type, drop_key, add_key, change_list, change_shape, change_type, swap_tensors, drop_tensor, add_tensor,
)  # fmt: skip
