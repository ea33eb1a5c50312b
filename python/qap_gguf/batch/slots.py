"""How many answers fit side by side: the arithmetic of ``--parallel auto`` (docs/batch.md).

A cell of the KV cache holds a key and a value of every layer. A slot has as many cells as its context has tokens. Half
of the free memory, less the model's files, is for cells; the rest is left for activations, pictures and others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qap_gguf import _core
from qap_gguf.errors import ConfigError
from qap_gguf.files.gguf import read_gguf
from qap_gguf.runtime.devices import find_device, language_devices, list_devices
from qap_gguf.serve.health import free_memory

#: What `auto` takes at most: more answers side by side share each pass over the weights, but not the arithmetic.
MOST: Final = 16
PART: Final = 0.5
#: Bytes of a number in the KV cache: blocks of ggml-common.h, which hold 32.
_BYTES: Final = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32,
    "q4_0": 18 / 32, "iq4_nl": 18 / 32,
}  # fmt: skip


def cell_bytes(model: str | os.PathLike[str], kv: str | None = None) -> int:
    """Bytes of a cell of the KV cache of a language model's file; models that keep less than that count as others.

    Args:
        model: the file, which has passed the gate.
        kv: the type; None is f16.

    Raises:
        ConfigError: the file does not say how many layers and heads there are.

    Example:
        >>> import qap_gguf as qap
        >>> cell_bytes(qap.packaged_model().model), cell_bytes(qap.packaged_model().model, "q8_0")
        (4096, 2176)
    """
    info = read_gguf(model).metadata
    arch = str(info.get("general.architecture"))
    arrays = _core.gguf_arrays(str(model), f"{arch}.attention.head_count")

    def heads(key: str) -> int:
        """The largest of its layers."""
        value = info.get(f"{arch}.{key}")
        return int(value if value is not None else max(arrays.get(f"{arch}.{key}") or [0]))

    layers, n_head = int(info.get(f"{arch}.block_count") or 0), heads("attention.head_count")
    if layers < 1 or n_head < 1:
        raise ConfigError("parallel: expected a model that tells its layers and heads for auto; give a number")
    width = int(info.get(f"{arch}.embedding_length") or 0) // n_head
    keys = int(info.get(f"{arch}.attention.key_length") or width)
    values = int(info.get(f"{arch}.attention.value_length") or width)
    return math.ceil(layers * (heads("attention.head_count_kv") or n_head) * (keys + values) * _BYTES[kv or "f16"])


def fitting(free: float, files: float, cell: int, n_ctx: int, most: int = MOST) -> int:
    """Slots whose cells fit, 1 or more.

    Args:
        free: bytes that are free.
        files: bytes of the files that are loaded too.
        cell: bytes of a cell.
        n_ctx: cells of a slot.
        most: no more than these.

    Example:
        LLaVA-1.5-7B: 512 KiB a cell, 4.4 GB of files, contexts of 2048 and of 256 tokens in 16 GB.

        >>> fitting(16e9, 4.4e9, 524288, 2048), fitting(16e9, 4.4e9, 524288, 256)
        (5, 16)
    """
    if math.isinf(free):
        return max(1, min(most, 2))
    return max(1, min(most, int(PART * (free - files) / (cell * n_ctx))))


def auto_slots(
    model: Path, mmproj: Path, n_ctx: int, kv: str | None, device: str | None, n_rows: int | None = None
) -> tuple[int, Mapping[str, Any]]:
    """The slots of ``--parallel auto``, and the numbers they came from.

    Args:
        model, mmproj: the files.
        n_ctx: tokens of a slot's context.
        kv: type of the KV cache.
        device: of the language model; where it is a GPU, its memory counts.
        n_rows: no more slots than rows.
    """
    table = list_devices()
    gpus = language_devices(table)
    chosen = find_device(None if device is None or device.lower() == "all" else device, "model_device", table)
    if chosen is not None:
        gpus = [] if chosen.kind == "cpu" else [chosen]
    free = float(sum(gpu.memory_free for gpu in gpus)) if gpus else free_memory()
    files = float(model.stat().st_size + mmproj.stat().st_size)
    cell = cell_bytes(model, kv)
    n = fitting(free, files, cell, n_ctx, MOST if n_rows is None else max(1, min(MOST, n_rows)))
    return n, {"free": free, "files": files, "cell": cell, "n_ctx": n_ctx}
