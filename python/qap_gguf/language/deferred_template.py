"""llama-cpp-python's formatter of the chat template in a file, made when it is first asked.

``llama_cpp.Llama`` compiles that template with Jinja2 while it opens the file, and Jinja2 computes constants while it
compiles: ``{{ 'a' * 10**10 }}`` takes 10 GB, in a branch that never runs too. Here libllama renders prompts, within a
budget (generation/chat_template.py), so most models never need that formatter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from llama_cpp import llama_chat_format

_MODULE: Any = llama_chat_format
_FORMATTER: Any = llama_chat_format.Jinja2ChatFormatter


class _Deferred:
    """Stands for a ``Jinja2ChatFormatter`` with these arguments."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._arguments = args, settings

    @cached_property
    def _formatter(self) -> Any:
        args, settings = self._arguments
        return _FORMATTER(*args, **settings)

    def __call__(self, **settings: Any) -> Any:
        return self._formatter(**settings)

    def to_chat_handler(self) -> Any:
        return llama_chat_format.chat_formatter_to_chat_completion_handler(self)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A ``llama_cpp.Llama`` that is made in this block compiles its template when its own chat is first used.

    Example:
        >>> import llama_cpp
        >>> import qap_gguf as qap
        >>> with deferred():
        ...     llm = llama_cpp.Llama(str(qap.packaged_model().model), n_ctx=64, verbose=False)
        >>> llm.close()
    """
    before = _MODULE.Jinja2ChatFormatter
    _MODULE.Jinja2ChatFormatter = _Deferred
    try:
        yield
    finally:
        # of two threads that open models the later one finds our own here
        _MODULE.Jinja2ChatFormatter = _FORMATTER if before is _Deferred else before
