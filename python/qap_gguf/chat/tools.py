"""Tools and response formats of a call: what the template is told, and the grammar that the answer must follow.

Where the template writes tools (``ChatTemplate.has_tool_calls``), llama.cpp's chat code gives the grammar of the calls,
and reads them out of the answer (:mod:`qap_gguf.chat.tool_answers`). Where it does not, a forced tool constrains the
answer to the JSON schema of its arguments, as in llama-cpp-python's handlers; with ``tool_choice="auto"`` the answer
is text. Unlike there, a schema that cannot become a grammar is an error, not any JSON.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from qap_gguf import _core
from qap_gguf.chat.schema_cost import MAX_WORK
from qap_gguf.chat.schemas import SchemaGrammar, check_schema, schema_grammar
from qap_gguf.errors import ConfigError

_MAX_TOOLS = 128  # as at OpenAI


def response_schema(response_format: Mapping[str, Any] | None) -> Any:
    """The schema of a response format: text (None), json_object (with or without ``schema``), or json_schema.

    Raises:
        ConfigError: another form.

    Example:
        >>> response_schema({"type": "json_object"})
        {'type': 'object'}
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")
        return {"type": "object"} if schema is None else schema
    schema = response_format.get("json_schema") if kind == "json_schema" else None
    if isinstance(schema, Mapping) and "schema" in schema:
        return schema["schema"]
    raise ConfigError(
        'response_format: expected {"type": "text" | "json_object" | "json_schema", ...}, '
        f"got {str(response_format)[:80]!r}; leave it out for text"
    )


def response_grammar(response_format: Mapping[str, Any] | None) -> LlamaGrammar | None:
    """The grammar of a response format.

    Raises:
        ConfigError: see :func:`response_schema`, or a schema that cannot become a grammar.

    Example:
        >>> response_grammar({"type": "text"}) is None
        True
    """
    schema = response_schema(response_format)
    return None if schema is None else schema_grammar(schema)


@dataclass(frozen=True)
class ToolChoice:
    """What a call says about tools.

    Attributes:
        tools: those that the model may call, checked; one that is forced stands alone.
        choice: "auto", "none" or "required".
        forced: the name of the one tool that must be called.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    choice: str = "auto"
    forced: str | None = None

    @property
    def is_open(self) -> bool:
        """The model may call a tool."""
        return bool(self.tools) and self.choice != "none"

    @property
    def shown(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the template tells the model of."""
        return self.tools if self.is_open else ()

    def only(self) -> str:
        """The name of the tool that must be called, for templates that write no tools.

        Raises:
            ConfigError: there are several.
        """
        if self.forced is None:
            raise ConfigError("tool_choice: expected one tool to require, for this model's template writes no tools")
        return self.forced

    def arguments_grammar(self) -> LlamaGrammar:
        """The grammar of the forced tool's arguments."""
        return schema_grammar(self.tools[0]["function"]["parameters"] or {"type": "object"})


def read_tools(functions: Sequence[Any] | None, function_call: Any, tools: Any, tool_choice: Any) -> ToolChoice:
    """Tools and their choice, in today's form or in that of ``functions`` and ``function_call``.

    Raises:
        ConfigError: tools of another form, a schema beyond its bounds, or a choice of a tool that is not there.

    Example:
        >>> read_tools([{"name": "look"}], {"name": "look"}, None, None).forced
        'look'
    """
    if functions is not None:
        if isinstance(functions, (str, bytes, Mapping)) or not isinstance(functions, Sequence):
            raise ConfigError(f"functions: expected a list of functions, got {str(functions)[:80]!r}; see docs/chat.md")
        tools = [{"type": "function", "function": function} for function in functions]
    if isinstance(function_call, str):
        tool_choice = function_call
    elif isinstance(function_call, Mapping):
        tool_choice = {"type": "function", "function": {"name": function_call.get("name")}}
    known = _checked(tools)
    if tool_choice in (None, "none", "auto"):
        return ToolChoice(known, tool_choice or "auto")
    names = [tool["function"]["name"] for tool in known]
    if tool_choice == "required" and known:
        return ToolChoice(known, "required", names[0] if len(names) == 1 else None)
    if not isinstance(tool_choice, Mapping) or not isinstance(tool_choice.get("function"), Mapping):
        raise ConfigError(f"tool_choice: expected none, auto, required with tools, or one by name, got {tool_choice!r}")
    name = tool_choice["function"].get("name")
    if name not in names:
        raise ConfigError(f"tool_choice: expected one of {', '.join(names) or 'no tools'}, got {name!r}; add the tool")
    return ToolChoice((known[names.index(name)],), "required", name)


def _checked(tools: Any) -> tuple[Mapping[str, Any], ...]:
    form = 'tools: expected a list of {"type": "function", "function": {"name": ...}}; see docs/chat.md'
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise ConfigError(form)
    out: list[Mapping[str, Any]] = []
    work = 0
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ConfigError(form)
        work += check_schema(function.get("parameters") or {})
        if len(out) >= _MAX_TOOLS or work > MAX_WORK:
            raise ConfigError(
                f"tools: expected at most {_MAX_TOOLS}, with schemas that are little work together; send fewer"
            )
        words = {"name": function["name"], "description": str(function.get("description") or "")}
        out.append({"type": "function", "function": {**words, "parameters": function.get("parameters") or {}}})
    return tuple(out)


class ToolGrammar(SchemaGrammar):
    """The grammar of calls of tools, with what its sampler needs.

    Attributes:
        patterns, tokens: what switches it on in the answer; both empty: from the beginning.
        prefill: tokens of the prompt's end that its rules begin with.
    """

    def __init__(self, llama: llama_cpp.Llama, native: _core.ChatPrompt) -> None:
        super().__init__(_grammar=native.grammar)
        self.patterns: list[str] = []
        self.tokens: list[int] = []
        for kind, text in native.triggers if native.grammar_lazy else ():
            if kind == "token":
                self.tokens.append(int(text))
            elif kind == "word":
                self.patterns.append(re.sub(r"[.^$|()*+?\[\]{}\\]", r"\\\g<0>", text))
            else:
                full = kind == "pattern_full"
                self.patterns.append(f"^{text.removeprefix('^').removesuffix('$')}$" if full else text)
        end = native.generation_prompt.encode()
        self.prefill = [] if native.grammar_lazy else llama.tokenize(end, add_bos=False, special=True)
        if self.prefill and not end[:1].isspace():  # some tokenizers put a space in front of a special token
            first = llama.detokenize(self.prefill[:1], special=True)
            self.prefill = self.prefill[1:] if first.isspace() else self.prefill

    def insert(self, llama: llama_cpp.Llama, chain: Any, at: int) -> None:
        """Put the sampler of the calls at place `at` of a chain, where ``_init_sampler`` has that of a grammar."""
        after = []
        while llama_cpp.llama_sampler_chain_n(chain) > at:
            after.append(llama_cpp.llama_sampler_chain_remove(chain, at))
        vocab, text, root = llama._model.vocab, self._grammar.encode(), self._root.encode()
        if self.patterns or self.tokens:
            patterns = (ctypes.c_char_p * len(self.patterns))(*(pattern.encode() for pattern in self.patterns))
            tokens = (llama_cpp.llama_token * len(self.tokens))(*self.tokens)
            made = llama_cpp.llama_sampler_init_grammar_lazy_patterns(
                vocab, text, root, patterns, len(patterns), tokens, len(tokens)
            )
        else:
            made = llama_cpp.llama_sampler_init_grammar(vocab, text, root)
        for sampler in [made, *after]:
            llama_cpp.llama_sampler_chain_add(chain, sampler)
        if made and self.prefill:
            _core.accept_checked(ctypes.cast(made, ctypes.c_void_p).value or 0, self.prefill)


def tool_grammar(llama: llama_cpp.Llama, native: _core.ChatPrompt) -> ToolGrammar | None:
    """The grammar that llama.cpp's chat code gives for the calls of a prompt's tools; None where it gives none."""
    return ToolGrammar(llama, native) if native.grammar else None
