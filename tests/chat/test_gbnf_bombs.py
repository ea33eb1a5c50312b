"""Grammars that would take all memory or time are refused before libllama parses them; ordinary ones pass."""

from __future__ import annotations

import resource
import time

import llama_cpp
import pytest
from llama_cpp import llama_grammar
from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf.chat.gbnf import check_ways
from qap_gguf.chat.grammars import check_grammar
from qap_gguf.errors import ConfigError


def doubling(n: int, leaf: str, form: str = "{0} {0}") -> str:
    rows = [f"r{i} ::= {form.format(f'r{i + 1}')}" for i in range(n)]
    return "\n".join(["root ::= r0", *rows, f"r{n} ::= {leaf}"])


BOMBS: dict[str, str] = {
    "m above n": 'root ::= "a"{5,2}',
    "m above n, in a group": 'root ::= ("b" ("a" | "c"){ 3 , 2 })',
    "a large m": 'root ::= "a"{1000000000}',
    "a large n": 'root ::= "a"{0,1000000000}',
    "digits": 'root ::= "a"{0,' + "9" * 18 + "}",
    "doubling": doubling(40, '"a" | ""'),
    "doubling, an option": doubling(40, '"a"?'),
    "doubling, a star": doubling(40, "[ab]*"),
    "doubling of ways": doubling(40, '"a"', "{0} | {0}"),
    "doubling of ways and rules": doubling(40, '"a"', "{0} {0} | {0} {0}"),
    "doubling in groups": doubling(40, '"a"?', "({0} ({0}))"),
    "repeated options": doubling(3, '"a"?', "{0}{{50}}"),
    "not in root": doubling(40, '"a"?').replace("root ::= r0", 'root ::= "x" r0'),
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused(text: str) -> None:
    """libllama is not asked here: a bomb that it sees takes the machine's memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ConfigError, match="grammar: expected") as caught:
        check_ways(text)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 10  # without the bounds: for ever
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kilobytes


def test_bounds_come_before_libllama(llama: llama_cpp.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_words: object) -> None:
        raise AssertionError("libllama was asked")

    monkeypatch.setattr(llama_cpp, "llama_sampler_init_grammar", parse)
    for text in BOMBS.values():
        with pytest.raises(ConfigError, match="grammar: expected"):
            check_grammar(llama, LlamaGrammar.from_string(text, verbose=False))


def test_deep_and_long_chains_are_counted_without_recursion(llama: llama_cpp.Llama) -> None:
    check_ways("\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(5000)), 'r5000 ::= "a"']))
    check_ways(doubling(9, '"a"?'))
    check_grammar(llama, LlamaGrammar.from_string(doubling(9, '"a"?'), verbose=False))


ORDINARY = [name for name in dir(llama_grammar) if name.endswith("_GBNF")]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_grammars_pass(llama: llama_cpp.Llama, name: str) -> None:
    check_ways(getattr(llama_grammar, name))
    check_grammar(llama, LlamaGrammar.from_string(getattr(llama_grammar, name), verbose=False))


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "a"{2,5} "b"{3} [c]{0,} "{5,2}" # "a"{5,2}',
        'root ::= "a" root | "b" ("c" | root)*',
        "root ::= ",
        "root ::= nowhere",
        'root ::= root "a"',
        "",
    ],
)
def test_odd_texts_are_left_to_the_parser(text: str) -> None:
    check_ways(text)


@pytest.mark.parametrize("text", ["no rule at all {", 'root ::= ("a"', 'root ::= "a")) | "b" ?'])
def test_what_is_no_grammar_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected GBNF"):
        check_ways(text)
