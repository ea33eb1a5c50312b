"""JSON schemas as grammars: llama.cpp's converter, behind a budget.

A schema may come from a stranger, and what the converter and the grammar's parser make of it grows with its numbers,
not with its text. So its size, depth and numbers are looked at first. What libllama's grammars cannot repeat (more
than :data:`MAX_REPEAT` times, llama-grammar.cpp) and patterns that the converter would replace by any string are
errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf import _core
from qap_gguf.errors import ConfigError

MAX_REPEAT: Final = 2000
MAX_TOTAL: Final = 20_000  # all repetitions of a schema
MAX_DEPTH: Final = 64
MAX_NODES: Final = 10_000
MAX_CHARACTERS: Final = 1 << 18
_REPEATS = ("minLength", "maxLength", "minItems", "maxItems")
#: Keywords that hold a schema in the place of the one that they stand in.
_SAME_PLACE = ("anyOf", "oneOf", "allOf")


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


def _check_references(schema: Any) -> None:
    """No ``$ref`` leads back to itself without anything of the answer in between."""

    def follow(node: Any, seen: frozenset[str]) -> None:
        if not isinstance(node, Mapping):
            return
        ref = node.get("$ref")
        if isinstance(ref, str):
            if ref in seen:
                raise ConfigError(f"schema: expected $ref {ref!r} to end somewhere, it leads back to itself; change it")
            follow(_resolve(schema, ref), seen | {ref})
        for key in _SAME_PLACE:
            for inner in node.get(key) or () if isinstance(node.get(key), list) else ():
                follow(inner, seen)

    for node in _walk(schema):
        if isinstance(node.get("$ref"), str):
            follow(node, frozenset())


def _resolve(schema: Any, ref: str) -> Any:
    if not ref.startswith("#"):
        raise ConfigError(f"schema: expected a $ref that begins with #, got {ref[:80]!r}; put the definition inside")
    node = schema
    for step in (part.replace("~1", "/").replace("~0", "~") for part in ref[1:].split("/")[1:]):
        if isinstance(node, Mapping) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            node = node[int(step)]
        else:
            raise ConfigError(f"schema: expected a definition at $ref {ref[:80]!r}, found none; add it")
    return node


def check_schema(schema: Any) -> str:
    """The schema as JSON text, if converting it stays within bounds.

    Raises:
        ConfigError: no JSON object, too large, too deep, with numbers that no grammar repeats, a ``$ref`` that leads
            nowhere or back to itself, or a pattern that cannot become a grammar.

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
    _check_references(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError) as err:  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"schema: expected JSON and Unicode, got other values ({err}); check it") from err
    if size > MAX_CHARACTERS:
        raise ConfigError(f"schema: expected at most {MAX_CHARACTERS} bytes, got {size}; make it smaller")
    return text


def _convert(text: str) -> str:
    try:
        return str(_core.json_schema_to_grammar(text))
    except RuntimeError as err:
        why = " ".join(str(err).removeprefix("JSON schema conversion failed:").split())[:200]
        raise ConfigError(f"schema: expected a JSON schema that can become a grammar, got an error ({why})") from err


def _check_patterns(schema: Any) -> None:
    """Upstream takes any string, and says so on stderr only, where it cannot read a pattern."""
    anything = _convert('{"type": "string"}')
    for node in _walk(schema):
        pattern = node.get("pattern")
        if not isinstance(pattern, str):
            continue
        anchored = pattern.startswith("^") and pattern.endswith("$")
        if not anchored or _convert(json.dumps({"type": "string", "pattern": pattern})) == anything:
            raise ConfigError(
                f"schema: expected a pattern that can become a grammar, with ^ and $, got {pattern[:80]!r}; change it"
            )


def schema_grammar(schema: Any) -> SchemaGrammar:
    """The grammar of a JSON schema.

    Raises:
        ConfigError: see :func:`check_schema`.

    Example:
        >>> "root ::=" in schema_grammar({"type": "integer", "minimum": 3, "maximum": 5})._grammar
        True
    """
    text = check_schema(schema)
    _check_patterns(schema)
    return SchemaGrammar(_grammar=_convert(text))
