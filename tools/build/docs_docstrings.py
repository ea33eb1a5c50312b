"""An extension of griffe, which reads our docstrings for the documentation's Python page (mkdocs.yml).

Our docstrings say ``Example:`` and name things in reStructuredText's way; griffe knows ``Examples:``, and the page is
Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
_HEADING = re.compile(r"^(\s*)Example:$", re.MULTILINE)


def as_markdown(text: str) -> str:
    """The docstring as griffe and Markdown want it."""
    return _HEADING.sub(r"\1Examples:", _ROLE.sub(r"`\1`", text))


class Docstrings(griffe.Extension):  # type: ignore[misc]
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
