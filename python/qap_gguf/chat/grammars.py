"""Grammars: those of strangers checked before libllama parses them, and all watched while they constrain an answer.

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
from qap_gguf.chat.schemas import SchemaGrammar
from qap_gguf.chat.tools import ToolGrammar
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
    if not isinstance(grammar, SchemaGrammar):  # those were bounded by their schema's budget
        _check_text(text)
    sampler = llama_cpp.llama_sampler_init_grammar(llama._model.vocab, text.encode(), grammar._root.encode())
    if not sampler:
        raise ConfigError("grammar: expected GBNF with a rule named root, got one that does not parse; check it")
    llama_cpp.llama_sampler_free(sampler)


def _check_text(text: Any) -> None:
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


def _insert(llama: llama_cpp.Llama, chain: Any, at: int, grammar: ToolGrammar) -> None:
    """Put the sampler of calls of tools where ``Llama._init_sampler`` has that of a grammar: after the penalties."""
    behind = []
    while llama_cpp.llama_sampler_chain_n(chain) > at:
        behind.append(llama_cpp.llama_sampler_chain_remove(chain, at))
    text, root = grammar._grammar.encode(), grammar._root.encode()
    if grammar.patterns or grammar.tokens:
        patterns = (ctypes.c_char_p * len(grammar.patterns))(*(p.encode() for p in grammar.patterns))
        tokens = (llama_cpp.llama_token * len(grammar.tokens))(*grammar.tokens)
        made = llama_cpp.llama_sampler_init_grammar_lazy_patterns(
            llama._model.vocab, text, root, patterns, len(patterns), tokens, len(tokens)
        )
    else:
        made = llama_cpp.llama_sampler_init_grammar(llama._model.vocab, text, root)
    for sampler in [made, *behind]:
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    if made and grammar.prefill:
        _core.accept_checked(ctypes.cast(made, ctypes.c_void_p).value or 0, grammar.prefill)


@contextlib.contextmanager
def watched(llama: llama_cpp.Llama) -> Iterator[None]:
    """Within the block, samplers that `llama` makes are checked ones."""
    original = llama._init_sampler
    patched: Any = llama

    def make(*args: Any, **settings: Any) -> _Checked:
        grammar = settings.get("grammar")
        if not isinstance(grammar, ToolGrammar):
            return _Checked(original(*args, **settings))
        sampler = original(*args, **{**settings, "grammar": None})
        _insert(llama, sampler.sampler, 1 + (settings.get("logits_processor") is not None), grammar)
        return _Checked(sampler)

    patched._init_sampler = make
    try:
        yield
    finally:
        del patched._init_sampler
