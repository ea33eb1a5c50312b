"""Grammars from strangers: checked before libllama parses them, and watched while they constrain an answer.

What was seen with llama-cpp-python 0.3.36: a grammar that does not parse gives a null sampler, whose use ends the
process; parentheses nested some ten thousand deep overflow the parser's stack; and where no token fits, as with
``"\\x00"``, the process aborts. Each of these is a ConfigError here.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf import _core
from qap_gguf.arguments import is_unicode
from qap_gguf.errors import ConfigError

_MAX_CHARACTERS = 1 << 18
_MAX_DEPTH = 200
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|#[^\n]*', re.DOTALL)


def check_grammar(llama: llama_cpp.Llama, grammar: Any) -> None:
    """The grammar is one that libllama parses.

    Raises:
        ConfigError: it is not, it is too large or nested too deep, or it is no LlamaGrammar.
    """
    if not isinstance(grammar, LlamaGrammar):
        raise ConfigError(f"grammar: expected a llama_cpp.LlamaGrammar, got {type(grammar).__name__}; make one")
    text = grammar._grammar
    if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"grammar: expected at most {_MAX_CHARACTERS} characters; make it shorter")
    depth = deepest = 0
    for letter in _LITERAL.sub("", text):
        depth += (letter == "(") - (letter == ")")
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        raise ConfigError(f"grammar: expected at most {_MAX_DEPTH} nested parentheses, got {deepest}; use rules")
    if not is_unicode(text):
        raise ConfigError("grammar: expected Unicode text, got a lone surrogate; take it out")
    sampler = llama_cpp.llama_sampler_init_grammar(llama._model.vocab, text.encode(), grammar._root.encode())
    if not sampler:
        raise ConfigError("grammar: expected GBNF with a rule named root, got one that does not parse; check it")
    llama_cpp.llama_sampler_free(sampler)


class _Checked:
    """A sampler of llama-cpp-python that raises where no token fits."""

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


@contextlib.contextmanager
def watched(llama: llama_cpp.Llama) -> Iterator[None]:
    """Within the block, samplers that `llama` makes are checked ones."""
    original = llama._init_sampler
    patched: Any = llama
    patched._init_sampler = lambda *args, **settings: _Checked(original(*args, **settings))
    try:
        yield
    finally:
        del patched._init_sampler
