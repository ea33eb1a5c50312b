"""Tools and response formats as llama-cpp-python's handlers know them: a grammar, and the shape of the answer.

A forced tool constrains the answer to its JSON schema; with ``tool_choice="auto"`` the template tells the model of
the tools and its answer comes as text. Unlike there, a schema that cannot become a grammar is an error, not any JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_cpp import llama_grammar
from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf.errors import ConfigError


def _grammar(schema: Any) -> LlamaGrammar:
    try:
        return LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)
    except Exception as err:  # the converter raises whatever it stumbles over
        raise ConfigError(
            f"schema: expected a JSON schema that can become a grammar, got an error ({' '.join(str(err).split())})"
        ) from err


def response_grammar(response_format: Mapping[str, Any] | None) -> LlamaGrammar | None:
    """The grammar of a response format: text, json_object (with or without ``schema``), or json_schema.

    Raises:
        ConfigError: another form, or a schema that cannot become a grammar.

    Example:
        >>> response_grammar({"type": "text"}) is None
        True
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        if response_format.get("schema") is not None:
            return _grammar(response_format["schema"])
        return LlamaGrammar.from_string(llama_grammar.JSON_GBNF, verbose=False)
    schema = response_format.get("json_schema") if kind == "json_schema" else None
    if isinstance(schema, Mapping) and "schema" in schema:
        return _grammar(schema["schema"])
    raise ConfigError(
        'response_format: expected {"type": "text" | "json_object" | "json_schema", ...}, '
        f"got {str(response_format)[:80]!r}; leave it out for text"
    )


def modern_tools(functions: Sequence[Any] | None, function_call: Any, tools: Any, tool_choice: Any) -> tuple[Any, Any]:
    """(tools, tool_choice), with the older ``functions`` and ``function_call`` put into their form."""
    if functions is not None:
        tools = [{"type": "function", "function": function} for function in functions]
    if isinstance(function_call, str):
        tool_choice = function_call
    elif isinstance(function_call, Mapping):
        tool_choice = {"type": "function", "function": {"name": function_call.get("name")}}
    return tools, tool_choice


def forced_tool(tools: Any, tool_choice: Any) -> tuple[str, LlamaGrammar] | None:
    """Name and grammar of the tool that the answer must call, None where the model answers freely.

    Raises:
        ConfigError: no such tool, or tools of another form.
    """
    if tools is not None and (
        not isinstance(tools, Sequence)
        or not all(isinstance(t, Mapping) and isinstance(t.get("function"), Mapping) for t in tools)
    ):
        raise ConfigError('tools: expected a list of {"type": "function", "function": {...}}; see docs/chat.md')
    if tool_choice in (None, "none", "auto"):
        return None
    known = list(tools or ())
    names = [str(tool["function"].get("name")) for tool in known]
    if tool_choice == "required" and len(names) == 1:
        name: Any = names[0]
    elif isinstance(tool_choice, Mapping) and isinstance(tool_choice.get("function"), Mapping):
        name = tool_choice["function"].get("name")
    else:
        raise ConfigError(
            f"tool_choice: expected none, auto, one tool by name, or required with one tool, got {tool_choice!r}"
        )
    if name not in names:
        raise ConfigError(f"tool_choice: expected one of {', '.join(names) or 'no tools'}, got {name!r}; add the tool")
    return name, _grammar(known[names.index(name)]["function"].get("parameters", {"type": "object"}))
