"""`qap-gguf info`: what is installed, where it was loaded from, and whether it is what this build was made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from qap_gguf.cli.common import output_options, print_json


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) for every leaf of nested mappings and lists.

    Example:
        >>> list(flatten({"a": {"b": 1}, "c": ["x", "y"], "d": None, "e": True}))
        [('a.b', '1'), ('c', 'x, y'), ('d', '-'), ('e', 'yes')]
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{name}.{index}")
    elif isinstance(value, (list, tuple)):
        yield name, ", ".join(map(str, value)) or "-"
    elif isinstance(value, bool):
        yield name, "yes" if value else "no"
    else:
        yield name, "-" if value is None else str(value)


@click.command(short_help="Show versions, libraries and backends.")
@output_options
def info(as_json: bool) -> None:
    """Print versions, commits, library paths, backends and the state of the pin.

    The pin is the one version of llama-cpp-python that this build works with. Paste the output into a bug report.

    \b
    Example:
      qap-gguf info --json
    """
    import qap_gguf as qap

    facts = qap.info()
    if as_json:
        print_json(facts)
        return
    lines = list(flatten(facts))
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        click.echo(f"{name:<{width}}  {text}")
