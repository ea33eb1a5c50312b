"""Open a VisionModel whose KV cache is of a chosen type.

Facts: llama.h, ``llama_context_params``: a quantized cache of values needs flash attention.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Final

from qap_gguf.devices import device_name, language_settings
from qap_gguf.errors import ConfigError
from qap_gguf.files import check_pair
from qap_gguf.language import open_llama
from qap_gguf.model import VisionModel
from qap_gguf.score import n_threads_default

#: Name of a KV cache type -> ggml_type.
KV_TYPES: Final = {"f16": 1, "f32": 0, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20}


def kv_settings(kv: str | None) -> dict[str, Any]:
    """Arguments of ``llama_cpp.Llama`` for a type of the KV cache; None leaves it to llama-cpp-python.

    Raises:
        ConfigError: an unknown type.

    Example:
        >>> kv_settings("q8_0")
        {'flash_attn': True, 'type_k': 8, 'type_v': 8}
    """
    if kv is None:
        return {}
    if kv not in KV_TYPES:
        raise ConfigError(f"kv: expected one of {', '.join(KV_TYPES)}, got {kv!r}; choose one of these")
    return {"flash_attn": True, "type_k": KV_TYPES[kv], "type_v": KV_TYPES[kv]}


@contextlib.contextmanager
def open_model(
    mmproj: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    kv: str | None = None,
    device: str | None = None,
    model_device: str | None = None,
    n_ctx: int = 2048,
    n_threads: int | None = None,
    seed: int = 0,
    verbose: bool = False,
) -> Iterator[VisionModel]:
    """Open a model for a `with` block; the settings are those of :class:`~qap_gguf.model.VisionModel`.

    Args:
        kv: type of keys and values in the KV cache, one of ``KV_TYPES``; every one runs with flash attention, so that
            types differ by their type alone. None leaves both to llama-cpp-python (f16, no flash attention).

    Raises:
        ConfigError: an unknown type.
        ModelFileError: see VisionModel.

    Example:
        >>> import qap_gguf as qap
        >>> files = qap.packaged_model()
        >>> with open_model(files.mmproj, files.model, kv="q8_0") as vlm:
        ...     vlm.generate([files.sample, "How many objects are there?"], max_tokens=8)
        'four'
    """
    if kv is None:
        with VisionModel(
            mmproj,
            model,
            device=device,
            model_device=model_device,
            n_ctx=n_ctx,
            n_threads=n_threads,
            seed=seed,
            verbose=verbose,
        ) as vlm:
            yield vlm
        return
    cache = kv_settings(kv)
    encoder_device = device_name(device)
    place = language_settings(device if model_device is None else model_device)
    check_pair(mmproj, model, n_ctx)
    settings: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_threads": n_threads or n_threads_default(),
        "n_threads_batch": n_threads or n_threads_default(),
        "seed": seed,
        "verbose": verbose,
        **place,
        **cache,
    }
    llama = open_llama(model, **settings)
    try:
        with VisionModel(mmproj, llama, device=encoder_device, n_threads=n_threads, verbose=verbose) as vlm:
            yield vlm
    finally:
        llama.close()
