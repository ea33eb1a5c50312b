"""JSON schemas as grammars: llama.cpp's converter, behind a budget.

A schema may come from a stranger, and what the converter and the grammar's parser make of it grows with its numbers,
not with its text. So its size, depth and numbers are looked at first. What libllama's grammars cannot repeat (more
than :data:`MAX_REPEAT` times, llama-grammar.cpp) and patterns that the converter would replace by any string are
errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf import _core
from qap_gguf.chat.schema_cost import check_cost
from qap_gguf.errors import ConfigError

MAX_REPEAT: Final = 2000
MAX_TOTAL: Final = 20_000  # all repetitions of a schema
MAX_DEPTH: Final = 64
MAX_NODES: Final = 10_000
MAX_CHARACTERS: Final = 1 << 18
_REPEATS = ("minLength", "maxLength", "minItems", "maxItems")
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": " "}  # a JSON string has no other white space unescaped


class SchemaGrammar(LlamaGrammar):
    """A grammar that was made here; the limits on strangers' grammars do not apply to it."""


def _walk(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    if depth > MAX_DEPTH:
        raise ConfigError(f"schema: expected at most {MAX_DEPTH} levels, got more; make it flatter")
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _walk(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, depth + 1)


def _count(node: Mapping[str, Any], key: str) -> int:
    value = node.get(key)
    if value is None or isinstance(value, (Mapping, list)):  # absent, or a property of that name
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        raise ConfigError(f"schema: expected an integer from 0 as {key}, got {str(value)[:40]!r}; correct it")
    if value > MAX_REPEAT:
        raise ConfigError(f"schema: expected {key} of at most {MAX_REPEAT}, got {str(value)[:40]}; make it smaller")
    return int(value)


def check_schema(schema: Any) -> int:
    """Converting the schema stays within bounds; the visits that it takes (:mod:`qap_gguf.chat.schema_cost`).

    Raises:
        ConfigError: no JSON object, too large, too deep, with numbers that no grammar repeats, a ``$ref`` that leads
            nowhere or back to itself, or more work for the converter than the text shows (schema_cost.py).

    Example:
        >>> check_schema({"type": "string", "minLength": 1_000_000_000})
        Traceback (most recent call last):
        qap_gguf.errors.ConfigError: schema: expected minLength of at most 2000, got 1000000000; make it smaller
    """
    if not isinstance(schema, (Mapping, bool)):
        raise ConfigError(f"schema: expected a JSON object, got {type(schema).__name__}; pass a JSON schema")
    total = 0
    for n_nodes, node in enumerate(_walk(schema)):
        if n_nodes >= MAX_NODES:
            raise ConfigError(f"schema: expected at most {MAX_NODES} objects, got more; make it smaller")
        total += sum(_count(node, key) for key in _REPEATS)
        if total > MAX_TOTAL:
            raise ConfigError(f"schema: expected lengths of at most {MAX_TOTAL} together, got more; make them smaller")
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError) as err:  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"schema: expected JSON and Unicode, got other values ({err}); check it") from err
    if size > MAX_CHARACTERS:
        raise ConfigError(f"schema: expected at most {MAX_CHARACTERS} bytes, got {size}; make it smaller")
    return check_cost(schema)


def _convert(text: str) -> str:
    try:
        return str(_core.json_schema_to_grammar(text))
    except RuntimeError as err:
        why = " ".join(str(err).removeprefix("JSON schema conversion failed:").split())[:200]
        raise ConfigError(f"schema: expected a JSON schema that can become a grammar, got an error ({why})") from err


@lru_cache(maxsize=1)
def _any_string() -> str:
    """What the converter gives where it cannot read a pattern; it says so on stderr only."""
    return _convert('{"type": "string", "pattern": "not anchored"}')


def _spelled_out(pattern: str) -> str:
    r"""A pattern without ``\d``, ``\w`` and ``\s``, which the converter does not know, outside of groups and in them.

    Example:
        >>> _spelled_out("^\\d{3}[\\w.]$")
        '^[0-9]{3}[A-Za-z0-9_.]$'
    """
    out, in_class, letters = "", False, iter(pattern)
    for letter in letters:
        if letter == "\\":
            escaped = next(letters, "")
            found = _CLASSES.get(escaped)
            out += f"\\{escaped}" if found is None else found if in_class else f"[{found}]"
            continue
        in_class = letter == "[" or (in_class and letter != "]")
        out += letter
    return out


def _with_patterns(schema: Any) -> Any:
    """The schema with its patterns spelled out."""
    if isinstance(schema, Mapping):
        out = {key: _with_patterns(value) for key, value in schema.items()}
        pattern = out.get("pattern")
        if isinstance(pattern, str):
            out["pattern"] = _spelled_out(pattern)
            anchored = pattern.startswith("^") and pattern.endswith("$") and len(pattern) > 1
            if not anchored or _convert(json.dumps({"type": "string", "pattern": out["pattern"]})) == _any_string():
                raise ConfigError(
                    "schema: expected a pattern that can become a grammar, with ^ and $, "
                    f"got {pattern[:80]!r}; change it"
                )
        return out
    return [_with_patterns(inner) for inner in schema] if isinstance(schema, list) else schema


def checked_schema(schema: Any) -> Any:
    """A schema that llama.cpp's converter takes: within bounds, its patterns spelled out.

    Raises:
        ConfigError: see :func:`check_schema`.

    Example:
        >>> checked_schema({"type": "string", "pattern": "^\\\\d$"})["pattern"]
        '^[0-9]$'
    """
    check_schema(schema)
    return _with_patterns(schema)


def schema_grammar(schema: Any) -> SchemaGrammar:
    """The grammar of a JSON schema.

    Raises:
        ConfigError: see :func:`check_schema`.

    Example:
        >>> "root ::=" in schema_grammar({"type": "integer", "minimum": 3, "maximum": 5})._grammar
        True
    """
    return checked_grammar(checked_schema(schema))


def checked_grammar(checked: Any) -> SchemaGrammar:
    """The grammar of what :func:`checked_schema` gave.

    Raises:
        ConfigError: llama.cpp's converter refuses it.

    Example:
        >>> "root ::=" in checked_grammar(checked_schema({"type": "boolean"}))._grammar
        True
    """
    return SchemaGrammar(_grammar=_convert(json.dumps(checked, ensure_ascii=False)))
