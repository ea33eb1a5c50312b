"""The child of files/trial.py: loads files that may end the process.

It writes a line of JSON for each stage that it begins and for each outcome.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qap_gguf import _core
from qap_gguf.errors import ModelFileError, QapError
from qap_gguf.model import VisionModel

try:
    import resource
except ImportError:  # no POSIX system: its time is limited, no more
    resource = None  # type: ignore[assignment]

_MEMORY = 3 << 30  # bytes above what the files take, for graphs
_CPU_SECONDS = 120
_SMALL = 256 << 20  # bytes of files that are run, not only opened
_MEMORY_WORDS = re.compile(r"bad_alloc|out of memory|failed to allocate|unable to allocate", re.IGNORECASE)
_TEXT = "Hello 1, caf\u00e9 \U0001f436\n"


def main(jobs: str) -> NoReturn:
    """Try all jobs, [mmproj, model, weights] with paths or None, and leave."""
    for mmproj, model, weights in json.loads(jobs):
        files = [Path(path) for path in (mmproj, model) if path is not None]
        limit(sum(path.stat().st_size for path in files))
        _say(outcome=attempt(mmproj, model, weights=weights))
    sys.exit(0)


def limit(n_bytes: int) -> None:
    """No core dumps, bounded time, and address space for files of so many bytes above what is in use."""
    if resource is None:
        return
    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, _CPU_SECONDS)):
        _lower(kind, most)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):  # no Linux: what is in use is not known
        return
    _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + 2 * n_bytes + _MEMORY)


def _lower(kind: int, most: int) -> None:
    """Set the soft limit, within the hard one."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def attempt(mmproj: str | None, model: str | None, *, weights: bool = True) -> str | None:
    """None where the files can be loaded, "refused" where llama.cpp says no in words, else why not.

    weights: the files have their tensors' data, so small ones are run too.

    Example:
        >>> attempt(None, "nowhere.gguf")
        {"stage": "reading the language model"}
        'refused'
    """
    try:
        if model is not None:
            _say(stage="reading the language model")
            _core.try_model(model, _TEXT)
        if mmproj is not None:
            _say(stage="reading the mmproj")
            _core.try_mmproj(mmproj)
        if mmproj is not None and model is not None:
            _core.inspect_mmproj(mmproj, model)
            if weights and Path(mmproj).stat().st_size + Path(model).stat().st_size <= _SMALL:
                _say(stage="answering a question about a picture")
                run(mmproj, model)
    except Exception as err:
        if isinstance(err, MemoryError) or _MEMORY_WORDS.search(str(err)):
            return "loading takes more memory than files of this size need"
        loaded = isinstance(err, QapError) and not isinstance(err, ModelFileError)
        return None if loaded else "refused"  # a question about a picture may not fit this model
    return None


def run(mmproj: str, model: str) -> None:
    """Encode a picture and answer one token."""
    with VisionModel(mmproj, model, n_ctx=1024, n_threads=1, device="cpu", check="none") as vlm:
        image = vlm.encode(np.full((64, 64, 3), 128, np.uint8))
        vlm.generate([image, "?"], max_tokens=1)


def _say(**entry: Any) -> None:
    print(json.dumps(entry), flush=True)
