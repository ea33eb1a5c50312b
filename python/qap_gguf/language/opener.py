"""The one place where a language model is loaded: for :class:`~qap_gguf.VisionModel`, for `serve`, for tools.

Facts: llama-cpp-python 0.3.36 takes seed 0 for a random one (``seed or LLAMA_DEFAULT_SEED``). llama.h: a quantized
cache of values needs flash attention. Rows that see each other stand in one batch (native/src/hooks-batch.cpp).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import llama_cpp

from qap_gguf import _core
from qap_gguf.arguments import n_threads_default
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.files.gguf import read_gguf
from qap_gguf.files.trial import admit
from qap_gguf.language.deferred_template import deferred
from qap_gguf.language.interrupts import held_back
from qap_gguf.language.kv_types import kv_settings
from qap_gguf.runtime.devices import language_settings
from qap_gguf.runtime.fork import check_process

_N_UBATCH = 512  # llama-cpp-python's own
_BLOCK = 32  # numbers of a block of the quantized types in KV_TYPES


def open_llama(path: str | os.PathLike[str], *, seed: int = 0, **settings: Any) -> llama_cpp.Llama:
    """Load a language model; failures are one line.

    Args:
        path: the GGUF file, which has passed :func:`~qap_gguf.files.gguf.check_pair`.
        seed: of sampling; 0 is a seed like others.
        settings: further arguments of ``llama_cpp.Llama``.

    Raises:
        ModelFileError: llama.cpp refuses the file.
    """
    try:
        with held_back(), deferred():
            llama = llama_cpp.Llama(model_path=str(Path(path)), seed=seed, **settings)
    except Exception as err:  # llama-cpp-python reads metadata too: text that is no UTF-8
        raise ModelFileError(
            f"expected a language model that llama.cpp can load, got {path} ({' '.join(str(err).split())}); "
            "set verbose=True to see its log"
        ) from err
    llama.set_seed(seed)
    return llama


def batch_rows(mmproj: str | os.PathLike[str]) -> int:
    """Rows that one batch must hold for the pictures of an mmproj file; 0 where batches may split a picture.

    Example:
        >>> import qap_gguf as qap
        >>> batch_rows(qap.packaged_model().mmproj)
        0
    """
    try:
        return int(_core.inspect_mmproj(str(mmproj), None)["batch_rows"])
    except RuntimeError:  # loading the file says why
        return 0


def open_language(
    model: str | os.PathLike[str],
    mmproj: str | os.PathLike[str],
    *,
    device: str | None = None,
    kv: str | None = None,
    n_ctx: int = 2048,
    n_batch: int = 512,
    n_threads: int | None = None,
    seed: int = 0,
    logits_all: bool = False,
    check: str = "gate",
    verbose: bool = False,
) -> llama_cpp.Llama:
    """Load the language model of a pair of files, which are checked first.

    Args:
        model, mmproj: the files.
        device: where it runs; None and "all" are all GPUs.
        kv: type of keys and values in the KV cache, one of ``KV_TYPES``; every one runs with flash attention, so that
            types differ by their type alone. None leaves both to llama-cpp-python (f16, no flash attention).
        n_ctx: cells of the KV cache.
        n_batch: tokens of a batch; raised to the rows of a picture where they must stand in one.
        n_threads: CPU threads; None is ``QAP_THREADS``, or one for each physical core that the process may use.
        seed: of sampling.
        logits_all: keep the logits of all tokens, for ``logprobs``.
        check: how the files are checked, see :func:`~qap_gguf.files.trial.admit`.
        verbose: let upstream write its log to stderr.

    Raises:
        ConfigError: no such device or type, or a type that does not fit the model's heads.
        ModelFileError: a file cannot be used, they do not belong together, or llama.cpp refuses the language model.
        QapError: this process was forked from one with a model, and `n_threads` is more than one.
    """
    cache, place = kv_settings(kv), language_settings(device)
    admit(mmproj, model, n_ctx, check)
    rows = batch_rows(mmproj)
    threads = n_threads or n_threads_default()
    check_process(threads)
    try:
        return open_llama(
            model,
            n_ctx=n_ctx,
            n_batch=max(n_batch, rows),
            n_ubatch=max(_N_UBATCH, rows),
            n_threads=threads,
            n_threads_batch=threads,
            seed=seed,
            logits_all=logits_all,
            verbose=verbose,
            **place,
            **cache,
        )
    except ModelFileError as err:
        width = 0 if kv in (None, "f16", "f32", "bf16") else head_width(model)
        if width % _BLOCK:
            raise ConfigError(
                f"kv: expected f16, bf16 or f32 for this model's heads of {width} numbers, got {kv}, whose blocks have "
                f"{_BLOCK}; choose one of these"
            ) from err
        raise


def head_width(model: str | os.PathLike[str]) -> int:
    """Numbers of a key in a language model's file, 0 where it does not say.

    Example:
        >>> import qap_gguf as qap
        >>> head_width(qap.packaged_model().model)
        64
    """
    keys = read_gguf(model).metadata
    arch = keys.get("general.architecture")
    heads = keys.get(f"{arch}.attention.head_count") or 0
    return int(keys.get(f"{arch}.attention.key_length") or (keys.get(f"{arch}.embedding_length", 0) // (heads or 1)))
