"""How much a stranger's grammar makes of itself before the first token: repetitions, and ways to begin.

libllama writes `{m,n}` out, with n below m some 2^64 times, and keeps a stack for each way to come to a terminal: forty
rules `rN ::= rM rM` over one that may be empty have 2^40 of them (llama-grammar.cpp, handle_repetitions and
llama_grammar_advance_stack of llama.cpp 0c1e570). Both are counted here, without doing it. What does not parse is left
to libllama, which says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from qap_gguf.errors import ConfigError

MAX_REPEAT: Final = 2000
MAX_WAYS: Final = 20_000
_TOKEN = re.compile(
    r'\s+|#[^\n]*|(?P<word>"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|!?<[^>\n]*>|\.)'
    r"|(?P<name>[A-Za-z0-9-]+)(?P<defines>\s*::=)?|\{(?P<times>[^}]*)\}|(?P<sign>[()|*+?])",
    re.DOTALL,
)
_TIMES = re.compile(r"\s*(\d{1,18})\s*(?:(,)\s*(\d{1,18})?\s*)?")


@dataclass
class _Item:
    """A terminal, the name of a rule, or a group; `least` and `most` say how often it stands there."""

    name: str | None = None
    group: list[list[_Item]] | None = None
    least: int = 1
    most: int = 1


@dataclass
class _Rules:
    """All rules; `found` has what is known of one: may it be empty, and in how many ways does it begin."""

    rules: dict[str, list[list[_Item]]] = field(default_factory=dict)
    found: dict[str, tuple[bool, int]] = field(default_factory=dict)

    def count(self, name: str) -> tuple[bool, int]:
        """Of one rule, those that it needs first; without recursion, for there may be many."""
        waiting: list[str] = [name]
        open_rules: set[str] = set()
        while waiting:
            top = waiting[-1]
            known = self.found.keys() | open_rules
            missing = [other for other in _names(self.rules[top]) if other in self.rules and other not in known]
            if top not in open_rules and missing:
                open_rules.add(top)
                waiting += missing
                continue
            waiting.pop()
            if top not in self.found:
                self.found[top] = self._group(self.rules[top])
        return self.found[name]

    def _group(self, group: list[list[_Item]]) -> tuple[bool, int]:
        empty, ways = False, 0
        for sequence in group:
            through = True
            for item in sequence:
                may_be_empty, n = self._item(item)
                ways = min(ways + n, MAX_WAYS + 1)
                if not may_be_empty:
                    through = False
                    break
            empty, ways = empty or through, ways + through
        return empty, min(ways, MAX_WAYS + 1)

    def _item(self, item: _Item) -> tuple[bool, int]:
        if item.group is not None:
            empty, ways = self._group(item.group)
        else:
            empty, ways = self.found.get(item.name, (False, 1)) if item.name is not None else (False, 1)
        if item.most != 1 or item.least != 1:
            ways = ways * (item.most if empty else 1) + 1
        return empty or item.least == 0, ways


def _names(group: list[list[_Item]]) -> list[str]:
    """Rules that a rule names."""
    found: list[str] = []
    for sequence in group:
        for item in sequence:
            if item.group is not None:
                found += _names(item.group)
            elif item.name is not None:
                found.append(item.name)
    return found


def check_bounds(text: str) -> None:
    """A grammar's repetitions, and each rule's ways to begin, are bounded.

    Args:
        text: GBNF.

    Raises:
        ConfigError: they are not.

    Example:
        >>> check_bounds('root ::= "a"{5,2}')
        Traceback (most recent call last):
        qap_gguf.errors.ConfigError: grammar: expected {m,n} with m up to n, at most 2000, got {5,2}; correct it
    """
    rules = _read(text)
    if any(rules.count(name)[1] > MAX_WAYS for name in rules.rules):
        raise ConfigError(
            f"grammar: expected at most {MAX_WAYS} ways to begin a rule, got more; let fewer of its parts be empty"
        )


def _read(text: str) -> _Rules:
    """The rules, as far as they parse."""
    rules = _Rules()
    groups: list[list[list[_Item]]] = []
    for token in _TOKEN.finditer(text):
        if token["name"] and token["defines"]:
            groups = [rules.rules.setdefault(token["name"], [])]
            groups[0].append([])
        elif token["times"] is not None:
            least, most = _times(token["times"])
            if groups and groups[-1][-1]:
                groups[-1][-1][-1].least, groups[-1][-1][-1].most = least, most
        elif not groups:
            continue
        elif token["word"] == '""':
            continue  # nothing at all
        elif token["name"] or token["word"]:
            groups[-1][-1].append(_Item(token["name"]))
        elif token["sign"] == "(":
            groups[-1][-1].append(_Item(group=[[]]))
            groups.append(groups[-1][-1][-1].group or [[]])
        elif token["sign"] == ")":
            groups = groups[:-1] if len(groups) > 1 else groups
        elif token["sign"] == "|":
            groups[-1].append([])
        elif token["sign"] and groups[-1][-1]:
            item = groups[-1][-1][-1]
            item.least = 1 if token["sign"] == "+" else 0
            item.most = 1 if token["sign"] == "?" else MAX_REPEAT
    return rules


def _times(text: str) -> tuple[int, int]:
    """m and n of {m}, {m,} and {m,n}."""
    found = _TIMES.fullmatch(text)
    if found is None:
        return 1, 1
    least = int(found[1])
    most = least if found[2] is None else MAX_REPEAT if found[3] is None else int(found[3])
    if least > most or most > MAX_REPEAT:
        raise ConfigError(
            f"grammar: expected {{m,n}} with m up to n, at most {MAX_REPEAT}, got {{{text.strip()[:40]}}}; correct it"
        )
    return least, most
