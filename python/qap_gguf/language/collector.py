"""Sums of squares of what a language model's matrices are multiplied with, collected by native code during prefills.

The numbers never come to Python before they are summed. Relies on names of llama-cpp-python that are not public, as
llama.py does; the pin keeps them in place. Facts: llama.h (cb_eval of llama_context_params can be set only
when a context is made; llama_set_embeddings lets all rows reach the end of the last layer).
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals

from qap_gguf import _core
from qap_gguf.errors import NativeError
from qap_gguf.language.interrupts import held_back

#: Kinds of rows, in the order of native/include/qap-imatrix.h.
KINDS: Final = ("image", "text", "answer")

Sums = dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]


class Collector:
    """Watches a language model from now on.

    Args:
        llama: it gets a new, empty context, in which every row is computed to the end.

    Attributes:
        kind: of the rows of the next batches, one of KINDS; None: they do not count (at first).

    Example:
        >>> import llama_cpp
        >>> import qap_gguf as qap
        >>> llama = llama_cpp.Llama(str(qap.packaged_model().model), n_ctx=64, n_threads=1, verbose=False)
        >>> collector = Collector(llama)
        >>> collector.kind = "text"
        >>> llama.eval([5, 6, 7])
        >>> sums, counts = collector.sums()["blk.0.attn_q.weight"]
        >>> sums.shape[0], counts.ravel().tolist()
        (3, [0, 3, 0])
        >>> collector.kind = None
        >>> llama.close()
    """

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self._native = _core.Imatrix()
        self._kind: str | None = None
        model: Any = llama
        params = model.context_params
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(_core.Imatrix.callback)
        params.cb_eval_user_data = self._native.address
        model._ctx.close()
        with held_back():
            context: Any = _internals.LlamaContext(model=model._model, params=params, verbose=model.verbose)
        model._ctx = model._stack.enter_context(contextlib.closing(context))
        model._qap_collector = self._native  # must outlive the context
        llama_cpp.llama_set_embeddings(context.ctx, True)

    @property
    def kind(self) -> str | None:
        """See above."""
        return self._kind

    @kind.setter
    def kind(self, kind: str | None) -> None:
        self._native.rows(-1 if kind is None else KINDS.index(kind))
        self._kind = kind

    def see(self, kind: str) -> None:
        """Set the kind, for ``LanguageModel.observed``."""
        self.kind = kind

    def check(self) -> None:
        """Raise NativeError where an input was not finite, or a product not as expected."""
        try:
            self._native.check()
        except RuntimeError as err:
            raise NativeError(str(err)) from err

    def sums(self) -> Sums:
        """For each matrix the sums of squares, float32 (3, columns times matrices), and how many rows were summed,
        int64 (3, experts or 1); the first axis is KINDS."""
        return self._native.entries()

    def start_from(self, sums: Sums) -> None:
        """Go on from what an earlier measurement had."""
        for name, (values, counts) in sums.items():
            self._native.put(name, values, counts)
