"""Grammars from strangers: checked before libllama parses them; see language/sampling.py for what follows.

What was seen with llama-cpp-python 0.3.36: a grammar that does not parse gives a null sampler, whose use ends the
process; parentheses nested some ten thousand deep overflow the parser's stack; and what is ambiguous enough takes all
memory (:mod:`qap_gguf.chat.gbnf`). All are a ConfigError here.
"""

from __future__ import annotations

import re
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf.arguments import is_unicode
from qap_gguf.chat.gbnf import check_ways
from qap_gguf.chat.schemas import SchemaGrammar
from qap_gguf.errors import ConfigError
from qap_gguf.language.vocabulary import Vocabulary

_MAX_CHARACTERS = 1 << 18
_MAX_DEPTH = 200
# One that is not closed goes on to the end: else each bracket of a row of them would look for an end of its own.
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?|#[^\n]*', re.DOTALL)
_PARENTHESIS = re.compile(r"[()]")


def check_grammar(llama: llama_cpp.Llama | Vocabulary, grammar: Any) -> None:
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
    depth = 0
    for letter in _PARENTHESIS.findall(_LITERAL.sub("", text)):
        depth += 1 if letter == "(" else -1
        if depth > _MAX_DEPTH:
            raise ConfigError(f"grammar: expected at most {_MAX_DEPTH} nested parentheses, got more; use rules")
    if not is_unicode(text):
        raise ConfigError("grammar: expected Unicode text, got a lone surrogate; take it out")
    check_ways(text)
