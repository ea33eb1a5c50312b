"""The work that a JSON schema makes llama.cpp's converter do, counted before: what its text does not show.

Facts of llama.cpp 0c1e570, common/json-schema.cpp and json-schema-to-grammar.cpp:

- a node with a list of types is built once for each of them, and so is everything in it;
- ``allOf`` takes in the properties of what its references lead to, each time anew, and ends the process by an endless
  recursion where they lead to the ``allOf`` again;
- n optional properties of an object cost n^3 / 6 copies of names;
- references are followed by recursion: a chain of them takes stack;
- which types a node may have is found by following every reference below ``anyOf``, ``oneOf`` and ``allOf`` anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

from qap_gguf.errors import ConfigError

MAX_WORK: Final = 200_000  # visits of the converter: a second or two
MAX_FOLLOWED: Final = 1_000_000  # nodes that are looked at to find types
MAX_LEVELS: Final = 1000  # of objects within objects, those that references lead to included
_COPIES_OF_A_VISIT: Final = 500  # of names of optional properties
#: Keywords that hold schemas in the place of the one that they stand in.
_SAME_PLACE: Final = ("anyOf", "oneOf", "allOf")
_LISTS: Final = (*_SAME_PLACE, "prefixItems")
_SINGLE: Final = ("items", "additionalProperties")

Node: TypeAlias = "Mapping[str, Any]"


def check_cost(schema: Any) -> int:
    """The converter takes the schema in bounded time and depth; in so many visits, at most :data:`MAX_WORK`.

    Args:
        schema: JSON, at most some ten thousand objects in a bounded number of levels.

    Raises:
        ConfigError: a ``$ref`` leads nowhere, or back to itself with nothing of the answer in between; too much work.

    Example:
        >>> check_cost({"type": "object", "properties": {f"p{i}": {} for i in range(9)}})
        11
        >>> check_cost({"type": "object", "properties": {f"p{i}": {} for i in range(900)}})
        Traceback (most recent call last):
        qap_gguf.errors.ConfigError: schema: expected less work to make a grammar of it, got too many optional \
properties, types or references; make properties required, or it smaller
    """
    return _Cost(schema).check() if isinstance(schema, Mapping) else 0


class _Cost:
    """The counts of one schema."""

    def __init__(self, schema: Node) -> None:
        self._schema = schema
        self._nodes = list(_mappings(schema))
        self._targets = {id(node): self._resolve(node["$ref"]) for node in self._nodes if _is_reference(node)}
        self._taken_in: dict[int, list[tuple[Node, bool]]] = {}
        self._n_taken_in = 0

    def check(self) -> int:
        """The visits; raises ConfigError for what is too much."""
        if any(_own_optional(node) ** 3 // _COPIES_OF_A_VISIT > MAX_WORK for node in self._nodes):
            raise _too_much()  # before all else is counted, which takes long where there are thousands
        followed = self._fold(self._nodes, self._same_place, lambda node, inner: 1 + len(_types(node)) + sum(inner))
        if sum(followed.values()) > MAX_FOLLOWED:
            raise _too_much()
        starts = [self._schema, *{id(target): target for target in self._targets.values()}.values()]
        heights = self._fold(starts, _inner, lambda _node, inner: 1 + max(inner, default=0))
        levels = sum(heights[id(node)] for node in starts)
        if levels > MAX_LEVELS:
            raise ConfigError(
                f"schema: expected at most {MAX_LEVELS} levels in all that references lead to, got {levels}; "
                "make it flatter, or use fewer definitions"
            )
        work = self._fold(starts, self._visited, self._visits)
        n_visits = sum(work[id(node)] for node in starts)
        if n_visits > MAX_WORK:
            raise _too_much()
        return n_visits

    def _fold(
        self, starts: list[Node], needs: Callable[[Node], list[Node]], value: Callable[[Node, list[int]], int]
    ) -> dict[int, int]:
        """value(node, values of what it needs) of `starts` and all that they need, by id; without recursion."""
        done: dict[int, int] = {}
        above: set[int] = set()
        stack = [(node, False) for node in starts]
        while stack:
            node, ready = stack.pop()
            if ready:
                above.discard(id(node))
                found = value(node, [done[id(inner)] for inner in needs(node)])
                done[id(node)] = min(found, MAX_FOLLOWED + 1)
            elif id(node) in above:
                raise ConfigError(
                    f"schema: expected $ref {self._a_reference(node)!r} to end somewhere, it leads back to itself; "
                    "change it, or leave allOf out around it"
                )
            elif id(node) not in done:
                above.add(id(node))
                stack.append((node, True))
                stack += [(inner, False) for inner in needs(node)]
        return done

    def _a_reference(self, node: Node) -> str:
        """The reference at this node, in it, or one that leads to it."""
        near = [node, *_list_of(node, "allOf")]
        near += [other for other in self._nodes if self._targets.get(id(other)) is node]
        return next((str(other["$ref"])[:80] for other in near if _is_reference(other)), "#")

    def _same_place(self, node: Node) -> list[Node]:
        """What a look for types goes on with."""
        if _is_reference(node):
            return [self._targets[id(node)]]
        return [inner for key in _SAME_PLACE for inner in _list_of(node, key)]

    def _merged(self, node: Node) -> list[tuple[Node, bool]]:
        """Properties that an ``allOf`` takes in, each as often as it does, and whether they become optional."""
        if id(node) not in self._taken_in:
            self._taken_in[id(node)] = found = []
            for child in _list_of(node, "allOf"):
                parts = [(child, bool(_types(child)))]
                parts += [(inner, True) for key in ("anyOf", "oneOf") for inner in _list_of(child, key)]
                for part, optional in parts:
                    end = part
                    while _is_reference(end):  # none leads back to itself: that was looked at first
                        end = self._targets[id(end)]
                    inner_properties, n_times = _properties(end), max(1, len(_types(end)))
                    self._n_taken_in += len(inner_properties) * n_times
                    if self._n_taken_in > MAX_WORK:
                        raise _too_much()
                    found += [(inner, optional or bool(_types(end))) for inner in inner_properties] * n_times
        return self._taken_in[id(node)]

    def _visited(self, node: Node) -> list[Node]:
        """What the converter visits from this node; what a reference leads to is visited once in all."""
        return [] if _is_reference(node) else [*_children(node), *(inner for inner, _ in self._merged(node))]

    def _visits(self, node: Node, inner: list[int]) -> int:
        optional = max(_own_optional(node), sum(is_optional for _, is_optional in self._merged(node)))
        return max(1, len(_types(node))) * (1 + sum(inner) + optional**3 // _COPIES_OF_A_VISIT)

    def _resolve(self, ref: str) -> Node:
        if not ref.startswith("#"):
            raise ConfigError(
                f"schema: expected a $ref that begins with #, got {ref[:80]!r}; put the definition inside"
            )
        node: Any = self._schema
        for step in (part.replace("~1", "/").replace("~0", "~") for part in ref[1:].split("/")[1:]):
            if isinstance(node, Mapping) and step in node:
                node = node[step]
            elif isinstance(node, list) and step.isdecimal() and len(step) < 9 and int(step) < len(node):
                node = node[int(step)]
            else:
                raise ConfigError(f"schema: expected a definition at $ref {ref[:80]!r}, found none; add it")
        return node if isinstance(node, Mapping) else {}


def _too_much() -> ConfigError:
    return ConfigError(
        "schema: expected less work to make a grammar of it, got too many optional properties, types or references; "
        "make properties required, or it smaller"
    )


def _mappings(value: Any) -> Iterator[Node]:
    """All objects in a value, from the outside."""
    stack = [value]
    while stack:
        found = stack.pop()
        if isinstance(found, Mapping):
            yield found
            stack += found.values()
        elif isinstance(found, list):
            stack += found


def _inner(node: Node) -> list[Node]:
    """The objects right below one."""
    found: list[Node] = []
    stack = list(node.values())
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            found.append(value)
        elif isinstance(value, list):
            stack += value
    return found


def _own_optional(node: Node) -> int:
    """Properties of an object that it does not require."""
    required = node.get("required")
    names = set(map(str, required)) if isinstance(required, list) else set()
    return sum(name not in names for name in _object(node, "properties"))


def _is_reference(node: Node) -> bool:
    return isinstance(node.get("$ref"), str)


def _types(node: Node) -> list[Any]:
    found = node.get("type")
    return found if isinstance(found, list) else []


def _list_of(node: Node, key: str) -> list[Node]:
    found = node.get(key)
    return [inner for inner in found if isinstance(inner, Mapping)] if isinstance(found, list) else []


def _object(node: Node, key: str) -> Node:
    found = node.get(key)
    return found if isinstance(found, Mapping) else {}


def _properties(node: Node) -> list[Node]:
    return [inner for inner in _object(node, "properties").values() if isinstance(inner, Mapping)]


def _children(node: Node) -> list[Node]:
    """The schemas in a schema."""
    found = [*_properties(node)]
    for key in _LISTS:
        found += _list_of(node, key)
    for key in _SINGLE:
        value = node.get(key)
        found += [value] if isinstance(value, Mapping) else []
    return found + _list_of(node, "items")
