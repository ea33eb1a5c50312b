"""Names of the files of a model that is split into several: ``name-00001-of-00003.gguf``, as llama.cpp counts them."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_PART: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z", re.IGNORECASE)
_MOST_PARTS: Final = 512  # native/src/gate/gate-language.cpp


class PartName(NamedTuple):
    """A part's name, taken apart: what stands before the number, the number from 1, how many there are."""

    stem: str
    number: int
    n_parts: int


def part_of(name: str) -> PartName | None:
    """What the name of a file, or a path, says of the part that it is; None where it is none.

    Example:
        >>> part_of("big/a-00002-of-00003.gguf")
        PartName(stem='big/a', number=2, n_parts=3)
    """
    found = _PART.search(name)
    return None if found is None else PartName(name[: found.start()], int(found[1]), int(found[2]))


def part_names(name: str) -> list[str]:
    """Names of all parts of a model whose first part has this name; that one alone otherwise.

    Example:
        >>> part_names("a-00001-of-00002.gguf"), part_names("a-00002-of-00002.gguf")
        (['a-00001-of-00002.gguf', 'a-00002-of-00002.gguf'], ['a-00002-of-00002.gguf'])
    """
    part = part_of(name)
    if part is None or part.number != 1 or not 1 < part.n_parts <= _MOST_PARTS:
        return [name]
    suffix = name[-len(".gguf") :]
    return [f"{part.stem}-{i:05}-of-{part.n_parts:05}{suffix}" for i in range(1, part.n_parts + 1)]
