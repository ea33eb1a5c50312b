"""Samplers of llama-cpp-python that raise where libllama would end the process, or sort what is no number.

What was seen with llama-cpp-python 0.3.36: where no token fits a grammar, as with ``"\\x00"``, the process aborts; of
logits that are NaN any token is chosen.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import llama_cpp

from qap_gguf import _core
from qap_gguf.errors import ConfigError, NativeError


class _Checked:
    """A sampler of llama-cpp-python, applied by our native code."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def sample(self, ctx: Any, idx: int = -1) -> int:
        chain = ctypes.cast(self._sampler.sampler, ctypes.c_void_p).value or 0
        try:
            return _core.sample_checked(int(ctx.ctx), chain, idx)
        except ValueError as err:
            raise ConfigError(
                "grammar: came to a point where no token of this model fits; loosen the grammar or the schema"
            ) from err
        except RuntimeError as err:
            raise NativeError(str(err)) from err


@contextlib.contextmanager
def checked(llama: llama_cpp.Llama) -> Iterator[None]:
    """Within the block, samplers that `llama` makes are checked ones."""
    original = llama._init_sampler
    patched: Any = llama

    def make(*args: Any, **settings: Any) -> _Checked:
        insert = getattr(settings.get("grammar"), "insert", None)  # one that makes its own sampler (chat/tools.py)
        if insert is None:
            return _Checked(original(*args, **settings))
        sampler = original(*args, **{**settings, "grammar": None})
        insert(llama, sampler.sampler, 1 + (settings.get("logits_processor") is not None))
        return _Checked(sampler)

    patched._init_sampler = make
    try:
        yield
    finally:
        del patched._init_sampler
