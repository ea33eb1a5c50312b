"""Pairs of GGUF files of a true shape with random weights, made once and kept in the cache.

Speed does not ask what the weights are; accuracy does, so nothing here says anything about answers. Layouts of the
blocks are those of ggml-common.h (block_q4_0, block_q6_K, block_q8_0). Written one tensor at a time under a temporary
name, so a file with the final name is a whole one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from qap_gguf.bench.shapes import (
    Language,
    Shape,
    Tensor,
    language_metadata,
    language_tensors,
    vision_metadata,
    vision_tensors,
)
from qap_gguf.convert.output.writer import Metadata, OutputFolder, f32_list, i32_list, str_list, value
from qap_gguf.errors import ConvertError

#: Part of the file names: raise it when the recipe changes, and old files are made anew.
RECIPE: Final = 2
_POOL: Final = 4099  # random blocks, repeated to fill a tensor; a prime, so that rows do not repeat
_BLOCKS: Final = {
    "Q4_0": (32, np.dtype([("d", "<f2"), ("q", "u1", (16,))])),
    "Q8_0": (32, np.dtype([("d", "<f2"), ("q", "i1", (32,))])),
    "Q6_K": (256, np.dtype([("ql", "u1", (128,)), ("qh", "u1", (64,)), ("s", "i1", (16,)), ("d", "<f2")])),
}
_SPREAD: Final = {"Q4_0": 4.6, "Q8_0": 73.0, "Q6_K": 18.5 * 16}  # standard deviation of a weight at d = 1
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RandomModel:
    """Where the two files are."""

    mmproj: Path
    model: Path


def cache_folder() -> Path:
    """``$QAP_CACHE``, else ``qap_gguf`` below ``$XDG_CACHE_HOME`` or ``~/.cache``; shapes lie in a folder of it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qap_gguf"
    return Path(os.environ.get("QAP_CACHE") or home).expanduser() / "shapes"


def _blocks(kind: str, n_weights: int, row: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """`n_weights` quantized weights, of a size that keeps activations near one for rows of `row` weights."""
    per_block, layout = _BLOCKS[kind]
    pool = np.frombuffer(rng.bytes(_POOL * layout.itemsize), layout).copy()
    if kind == "Q6_K":
        pool["s"] = rng.choice(np.array([-16, 16], np.int8), (_POOL, 16))
    pool["d"] = 0.5 * row**-0.5 / _SPREAD[kind]
    return np.resize(pool, n_weights // per_block)


def _weights(tensor: Tensor, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Values as they stand in the file: float16 or float32 of the tensor's shape, or bytes, a row of blocks last."""
    n, row = int(np.prod(tensor.shape)), int(np.prod(tensor.shape[1:]))
    if tensor.kind in _BLOCKS:
        made = _blocks(tensor.kind, n, tensor.shape[-1], rng).view(np.uint8)
        return made.reshape(*tensor.shape[:-1], -1)
    dtype = np.dtype("<f2") if tensor.kind == "F16" else np.dtype("<f4")
    scale = 0.5 * row**-0.5 if tensor.kind == "F16" else 0.02
    pool = rng.standard_normal(_POOL * 16, dtype=np.float32) * np.float32(scale)
    if len(tensor.shape) == 1 and tensor.name.endswith("weight"):
        pool += np.float32(1.0)  # of a norm
    return np.resize(pool.astype(dtype), n).reshape(tensor.shape)


def n_bytes(tensor: Tensor) -> int:
    """Size of a tensor in the file.

    Example:
        >>> n_bytes(Tensor("x", "Q4_0", (2, 64)))
        72
    """
    n = int(np.prod(tensor.shape))
    if tensor.kind in _BLOCKS:
        per_block, layout = _BLOCKS[tensor.kind]
        return n // per_block * layout.itemsize
    return n * (2 if tensor.kind == "F16" else 4)


def vocabulary(m: Language) -> Metadata:
    """A vocabulary of single characters, bytes and the template's words, filled up with tokens that no text has."""
    fixed = [("<unk>", _CONTROL), ("<s>", _CONTROL), ("</s>", _CONTROL)]
    fixed += [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    fixed += [(chr(code), _NORMAL) for code in range(33, 127)] + [("\u2581", _NORMAL)]
    fixed += [(text, _CONTROL if text.strip() else _NORMAL) for text in m.special]
    fixed += [(text, _USER_DEFINED) for text in m.words]
    fixed += [(f"<unused_{i}>", _UNUSED) for i in range(m.n_vocab - len(fixed))]
    return {
        "tokenizer.ggml.model": value("llama"),
        "tokenizer.ggml.tokens": str_list([text for text, _ in fixed]),
        "tokenizer.ggml.scores": f32_list([0.0] * len(fixed)),
        "tokenizer.ggml.token_type": i32_list([kind for _, kind in fixed]),
        "tokenizer.ggml.bos_token_id": value(1),
        "tokenizer.ggml.eos_token_id": value(2),
        "tokenizer.ggml.unknown_token_id": value(0),
        "tokenizer.ggml.add_bos_token": value(True),
        "tokenizer.ggml.add_space_prefix": value(False),
    }


def _write(path: Path, arch: str, metadata: Metadata, tensors: list[Tensor], step: Callable[[str], None]) -> None:
    """Write one file; the same shape gives the same bytes."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    try:
        for key, (item, value_type, sub) in metadata.items():
            writer.add_key_value(key, item, value_type, sub)
        for tensor in tensors:
            size, kind = n_bytes(tensor), gguf.GGMLQuantizationType[tensor.kind]
            is_block = tensor.kind in _BLOCKS
            shape = (*tensor.shape[:-1], size // int(np.prod(tensor.shape[:-1]))) if is_block else tensor.shape
            dtype = np.dtype(np.uint8) if is_block else np.dtype("<f2" if tensor.kind == "F16" else "<f4")
            writer.add_tensor_info(tensor.name, shape, dtype, size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_weights(tensor, rng))
            step(tensor.name)
        writer.flush()
    finally:
        writer.close()


def make_random_model(shape: Shape, folder: Path | None = None, progress: Progress | None = None) -> RandomModel:
    """Find the pair of files of a shape in the cache, or make it.

    Args:
        shape: see ``SHAPES``.
        folder: where the files are kept; None takes :func:`cache_folder`.
        progress: called as progress(done, total, tensor) while a file is written.

    Raises:
        ConvertError: the folder cannot be written to, or has not the room.
    """
    folder = cache_folder() if folder is None else folder
    m, v = shape.language, shape.vision
    label = f"random {shape.name}"
    made = RandomModel(
        folder / f"mmproj-{shape.name}-random{RECIPE}-f16.gguf", folder / f"{shape.name}-random{RECIPE}-Q4_0.gguf"
    )
    recipes: list[tuple[Path, str, Callable[[], Metadata], list[Tensor]]] = [
        (made.mmproj, "clip", lambda: vision_metadata(v, m.n_embd, label), vision_tensors(v, m.n_embd)),
        (made.model, m.arch, lambda: language_metadata(m, label) | vocabulary(m), language_tensors(m)),
    ]
    missing = [recipe for recipe in recipes if not recipe[0].is_file()]
    if not missing:
        return made
    total, done = sum(len(tensors) for *_, tensors in missing), 0

    def step(name: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, name)

    with OutputFolder(folder, force=False) as out:
        needed = sum(n_bytes(tensor) for *_, tensors in missing for tensor in tensors)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ConvertError(
                f"expected {needed / 1e9:.1f} GB free in {folder} for {shape.name}, got {free / 1e9:.1f} GB; "
                "free some space or set QAP_CACHE"
            )
        for path, arch, metadata, tensors in missing:
            temporary = out.temp(path)
            try:
                _write(temporary, arch, metadata(), tensors, step)
            except OSError as err:
                raise ConvertError(
                    f"expected to write to {folder}, got a refusal ({err.strerror or err}); "
                    "free some space or set QAP_CACHE"
                ) from err
            try:
                out.commit((temporary, path))
            except ConvertError:
                if not path.is_file():  # not just another process that was faster: its file is the same
                    raise
    return made
