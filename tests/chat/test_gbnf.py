"""Grammars are bounded before libllama sees them, and what it takes is still taken."""

from __future__ import annotations

import random
import time

import llama_cpp
import pytest
from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf.chat.gbnf import MAX_WAYS, check_ways
from qap_gguf.chat.grammars import check_grammar
from qap_gguf.errors import ConfigError

JSON = r"""
root   ::= object # a comment
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (
    value
    ("," ws value)*
  )? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
GOOD = [
    JSON,
    'root ::= "a"{3} b{2,} c{0,2000}\nb ::= .\nc ::= [^a-z]',
    'root ::= ("a"?)* ("b" "")*\n',
    "root ::= " + " | ".join(f'"word {i}"' for i in range(MAX_WAYS)),
    "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40)) + '\nr40 ::= "a"',
    'root ::=\n  "a" |\n  "b"\n\n# the end',
]
BAD = {
    "5,2": 'root ::= "a"{5,2}',
    "many times": 'root ::= "a"{2001}',
    "nullable": "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40)) + '\nr40 ::= "a" | ""',
    "either": "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} | r{i + 1} 'x'" for i in range(40)).replace("'", '"')
    + '\nr40 ::= "a"',
    "left": 'root ::= root "a" | "a"',
    "by way of nothing": 'root ::= x root "a" | "a"\nx ::= "b"?',
    "optional in optional": 'root ::= (("a"?){1000}){2}',
    "more words": "root ::= " + " | ".join(f'"word {i}"' for i in range(MAX_WAYS + 1)),
    "a chain without an end": 'root ::= a\na ::= b "x"\nb ::= root | a',
    "no rule": "root",
    "open": 'root ::= ("a"',
    "quote": 'root ::= "a',
    "repeated nothing": 'root ::= * "a"',
}  # fmt: skip


def taken(llama: llama_cpp.Llama, text: str) -> bool:
    """Whether libllama parses it."""
    sampler = llama_cpp.llama_sampler_init_grammar(llama._model.vocab, text.encode(), b"root")
    if sampler:
        llama_cpp.llama_sampler_free(sampler)
    return bool(sampler)


def refused(text: str) -> str | None:
    """Why it is not taken here."""
    try:
        check_ways(text)
    except ConfigError as err:
        return str(err)
    return None


@pytest.mark.parametrize("text", GOOD)
def test_what_is_taken(llama: llama_cpp.Llama, text: str) -> None:
    check_grammar(llama, LlamaGrammar.from_string(text, verbose=False))


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_what_is_refused(llama: llama_cpp.Llama, text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="grammar"):
        check_grammar(llama, LlamaGrammar.from_string(text, verbose=False))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("reverse", [False, True])
def test_long_grammars_take_little_time(reverse: bool) -> None:
    lines = ["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(9000)), 'r9000 ::= "a"']
    started = time.monotonic()
    check_ways("\n".join(reversed(lines) if reverse else lines))
    assert time.monotonic() - started < 10


def test_it_reads_what_libllama_reads(llama: llama_cpp.Llama) -> None:
    """Pieces put together at random: whatever libllama parses is parsed here."""
    rng = random.Random(2026)
    pieces = [
        '"a"',
        '""',
        "[a-z]",
        "[^\\]]",
        ".",
        "b",
        "(",
        ")",
        "|",
        "*",
        "+",
        "?",
        "{2}",
        "{1,}",
        "{0,3}",
        "\n",
        " ",
        "#x\n",
    ]
    n_taken = 0
    for _ in range(3000):
        text = "root ::= " + " ".join(rng.choices(pieces, k=rng.randint(1, 7))) + '\nb ::= "c" | "d" "e"'
        why = refused(text)
        if why is None or "begin" not in why:
            is_taken = taken(llama, text)
            assert why is None or not is_taken, (text, why)
            n_taken += is_taken
    assert n_taken > 300
