"""How many ways a grammar has to go on, counted before libllama tries them all.

libllama keeps a stack for each way in which the next character may be derived (llama-grammar.cpp,
``llama_grammar_advance_stack``). Forty short rules can have 2**40 of them, which takes all memory before the first
token, and a thousand make a token slow, for each is compared with the whole vocabulary. Here GBNF is parsed, as
libllama parses it, and the ways are counted instead: for a sequence, those of its first element, and where that may be
empty those of the rest as often as it may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from qap_gguf.errors import ConfigError

MAX_WAYS: Final = 1000
#: libllama's own bound on {m,n} (MAX_REPETITION_THRESHOLD); a first number above the second it repeats without end.
MAX_REPEAT: Final = 2000
_MAX_WORK: Final = 300_000  # elements that are looked at, again where what they stand for has changed
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9-]+")
_DEFINED = re.compile(r"[A-Za-z0-9-]+[ \t]*::=")  # a comment goes on to the end of its line: no "::=" after one
_LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_TOKEN = re.compile(r"\[(?:[^\]\\]|\\.)*\]|\.|!?<[^>\r\n]*>", re.DOTALL)
_REPEAT = re.compile(r"[*+?]|\{[ \t]*(\d{1,9})[ \t]*(,?)[ \t]*(\d{1,9})?[ \t]*\}")

#: Ways to go on with a character, and ways to be empty.
Ways: TypeAlias = "tuple[int, int]"
_CHARACTER: Final[Ways] = (1, 0)
_EMPTY: Final[Ways] = (0, 1)


@dataclass
class _Repeated:
    """An element that stands `low` to `high` times, without end for None."""

    element: _Element
    low: int
    high: int | None


@dataclass
class _Group:
    """Alternatives, each a sequence."""

    alternatives: list[list[_Element]] = field(default_factory=list)


_Element: TypeAlias = "Ways | str | _Group | _Repeated"


class _Parser:
    """GBNF to rules; the rule of a name that is defined twice has the alternatives of the last one, as in libllama."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def rules(self) -> dict[str, _Group]:
        """All rules by name."""
        found: dict[str, _Group] = {}
        self._skip(_SPACES)
        while self._at < len(self._text):
            match = _DEFINED.match(self._text, self._at)
            if match is None:
                raise self._error()
            self._at = match.end()
            self._skip(_SPACES)
            name = _NAME.match(match[0])
            assert name is not None
            found[name[0]] = self._alternatives(nested=False)
            self._skip(_SPACES)
        return found

    def _error(self) -> ConfigError:
        rest = " ".join(self._text[self._at : self._at + 20].split())
        return ConfigError(f"grammar: expected GBNF, got an error at {rest!r}; check it")

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _alternatives(self, nested: bool) -> _Group:
        group = _Group([self._sequence(nested)])
        while self._text.startswith("|", self._at):
            self._at += 1
            self._skip(_SPACES)
            group.alternatives.append(self._sequence(nested))
        return group

    def _sequence(self, nested: bool) -> list[_Element]:
        out: list[_Element] = []
        while True:
            element = self._element()
            if element is not None:
                out.append(element)
            else:
                repeat = _REPEAT.match(self._text, self._at)
                if repeat is None:
                    return out
                if not out:
                    raise self._error()
                self._at = repeat.end()
                out[-1] = _Repeated(out[-1], *self._bounds(repeat))
            self._skip(_SPACES if nested else _SPACE)

    def _element(self) -> _Element | None:
        """The element at this place; None where none begins."""
        if literal := _LITERAL.match(self._text, self._at):
            self._at = literal.end()
            return _CHARACTER if literal[1] else _EMPTY
        elif token := _TOKEN.match(self._text, self._at):
            self._at = token.end()
            return _EMPTY if token[0] in ("[]", "[^]") else _CHARACTER
        elif self._text.startswith("(", self._at):
            self._at += 1
            self._skip(_SPACES)
            group = self._alternatives(nested=True)
            if not self._text.startswith(")", self._at):
                raise self._error()
            self._at += 1
            return group
        elif (name := _NAME.match(self._text, self._at)) and not _DEFINED.match(self._text, self._at):
            self._at = name.end()
            return name[0]
        return None

    @staticmethod
    def _bounds(repeat: re.Match[str]) -> tuple[int, int | None]:
        if repeat[0] in "*+?":
            return int(repeat[0] == "+"), 1 if repeat[0] == "?" else None
        low = int(repeat[1])
        high = int(repeat[3]) if repeat[3] else None if repeat[2] else low
        if low > MAX_REPEAT or (high is not None and not low <= high <= MAX_REPEAT):
            raise ConfigError(
                f"grammar: expected a repetition {{m,n}} with m <= n <= {MAX_REPEAT}, got {repeat[0]}; correct it"
            )
        return low, high


def _then(first: Ways, rest: Ways) -> Ways:
    most = MAX_WAYS + 1
    return min(first[0] + first[1] * rest[0], most), min(first[1] * rest[1], most)


def _ways(element: _Element, known: dict[str, Ways]) -> Ways:
    if isinstance(element, tuple):
        return element
    if isinstance(element, str):
        return known.get(element, (0, 0))
    if isinstance(element, _Group):
        found = [_sequence_ways(sequence, known) for sequence in element.alternatives]
        return min(sum(way[0] for way in found), MAX_WAYS + 1), min(sum(way[1] for way in found), MAX_WAYS + 1)
    once = _ways(element.element, known)
    # x* is r ::= x r | (nothing); x{m,n} is m times x, and then x in x, each of which may be left out
    out: Ways = (once[0], 1) if element.high is None else _EMPTY
    for _ in range((element.high or 0) - element.low):
        going_on = _then(once, out)
        out = going_on[0], min(going_on[1] + 1, MAX_WAYS + 1)
        if out[0] > MAX_WAYS:
            break
    for _ in range(element.low):
        out = _then(once, out)
        if once[1] == 0 or out[0] > MAX_WAYS:
            break  # one that is not empty hides what follows
    return out


def _sequence_ways(sequence: list[_Element], known: dict[str, Ways]) -> Ways:
    out = _EMPTY
    for element in reversed(sequence):
        out = _then(_ways(element, known), out)
    return out


def _elements(element: _Element) -> Iterator[_Element]:
    """An element and all within it."""
    yield element
    if isinstance(element, _Repeated):
        yield from _elements(element.element)
    elif isinstance(element, _Group):
        for sequence in element.alternatives:
            for inner in sequence:
                yield from _elements(inner)


def check_ways(text: str) -> None:
    """No rule of a grammar has more than :data:`MAX_WAYS` ways to begin.

    Raises:
        ConfigError: one has, one begins with itself, a repetition is beyond its bounds, or this is no GBNF.

    Example:
        >>> check_ways('root ::= ("yes" | "no") "!"*')
        >>> check_ways('root ::= "a"{5,2}')
        Traceback (most recent call last):
        qap_gguf.errors.ConfigError: grammar: expected a repetition {m,n} with m <= n <= 2000, got {5,2}; correct it
    """
    rules = _Parser(text).rules()
    inside = {name: list(_elements(group)) for name, group in rules.items()}
    users: dict[str, set[str]] = {}
    for name, elements in inside.items():
        for element in elements:
            if isinstance(element, str):
                users.setdefault(element, set()).add(name)
    known: dict[str, Ways] = {}
    todo, work = dict.fromkeys(reversed(rules)), 0
    while todo:
        name = next(iter(todo))
        del todo[name]
        work += len(inside[name])
        found = _ways(rules[name], known)
        if found[0] > MAX_WAYS:
            raise ConfigError(
                f"grammar: expected at most {MAX_WAYS} ways to begin a rule, got more for {name[:40]!r}; "
                "make it less ambiguous"
            )
        if work > _MAX_WORK:
            raise ConfigError("grammar: expected rules that do not begin with themselves; simplify it")
        if found != known.get(name, (0, 0)):
            known[name] = found
            todo.update(dict.fromkeys(users.get(name, ())))
