"""Open a VisionModel whose KV cache is of a chosen type.

Facts: llama.h, ``llama_context_params``: a quantized cache of values needs flash attention.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from qap_gguf.arguments import n_threads_default
from qap_gguf.files.gguf import check_pair
from qap_gguf.language.kv_types import kv_settings
from qap_gguf.language.llama import open_llama
from qap_gguf.model import VisionModel
from qap_gguf.runtime.devices import device_name, language_settings


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
