"""Peak memory of a fresh process that answers once, and the cells of a KV cache in bytes.

A process of its own for each number of tokens: in one process the passes share buffers, and what one of them needed
stays resident for the next.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp

from qap_gguf.config import PruneConfig


def kv_bytes(llama: llama_cpp.Llama) -> int:
    """Bytes of the cells in use: the size of the saved sequence, which is keys and values and some bytes a cell."""
    return int(llama_cpp.llama_state_seq_get_size(llama._ctx.ctx, 0))


def _answer_once(
    mmproj: Path, model: Path, settings: dict[str, Any], image: Any, text: str, config: PruneConfig | None
) -> int:
    from qap_gguf.model import VisionModel

    with VisionModel(mmproj, model, **settings) as vlm:
        for _ in vlm.generate([image, text], prune=config, max_tokens=2, stream=True):
            pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): bytes on macOS, kilobytes elsewhere


def peak_bytes(
    mmproj: Path, model: Path, settings: dict[str, Any], image: Any, text: str, config: PruneConfig | None
) -> int:
    """Peak of the resident memory of a process that loads a model, encodes a picture and answers, in bytes.

    Weights are in it, also those that are only mapped from the file, and twice where ggml packs them anew.

    Args:
        mmproj, model: files.
        settings: arguments of :class:`~qap_gguf.VisionModel`.
        image: the picture, as ``VisionModel.encode`` takes it.
        text: the question.
        config: how to prune; None keeps all.

    Raises:
        QapError: whatever opening and answering raise.
    """
    # "spawn": a forked child would start with all that this process holds.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_answer_once, mmproj, model, settings, image, text, config).result()
