#!/usr/bin/env python3
"""Write unicode-classes.inc and unicode-forms.inc of native/src/clip-text from Python's own Unicode data.

    python tools/build/make_unicode_tables.py

CLIP's tokenizer composes text (NFC), lowers its case and asks which characters are letters, digits or white space
(clip-bpe.cpp). The tables are checked in, so a build needs no Python data; run this again for a newer
Unicode.
"""

from __future__ import annotations

import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native" / "src" / "clip-text"
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic, not by table


def ranges(belongs: Callable[[str], bool]) -> list[int]:
    """first, last, first, last, ... of the code points that belong."""
    out: list[int] = []
    before = False
    for code in range(0x110000):
        now = belongs(chr(code))
        if now != before:
            out.append(code if now else code - 1)
        before = now
    return [*out, 0x10FFFF] if before else out


def lower_runs() -> list[int]:
    """first, last, step, difference to the lower case, ...; only what becomes one other code point."""
    runs: list[list[int]] = []
    for code in range(0x110000):
        low = chr(code).lower()
        if len(low) != 1 or ord(low) == code:
            continue
        if runs:
            first, last, step, difference = runs[-1]
            gap = code - last
            if ord(low) - code == difference and (gap == step or (first == last and gap <= 2)):
                runs[-1] = [first, code, gap, difference]
                continue
        runs.append([code, code, 1, ord(low) - code])
    return [number for run in runs for number in run]


def decompositions() -> tuple[list[int], list[int], list[int]]:
    """(composed, first, second, ...), the same for pairs that are never composed again, and (from, to, ...)."""
    pairs: list[int] = []
    excluded: list[int] = []
    single: list[int] = []
    for code in range(0x110000):
        text = unicodedata.decomposition(chr(code))
        if not text or text.startswith("<") or code in HANGUL:
            continue
        parts = [int(part, 16) for part in text.split()]
        if len(parts) == 1:
            single += [code, *parts]
        else:
            composes = unicodedata.normalize("NFC", "".join(map(chr, parts))) == chr(code)
            (pairs if composes else excluded).extend([code, *parts])
    return pairs, excluded, single


def combining_classes() -> list[int]:
    """first, last, class, ... of the code points whose canonical combining class is not 0."""
    out: list[list[int]] = []
    for code in range(0x110000):
        kind = unicodedata.combining(chr(code))
        if kind and out and out[-1][1:] == [code - 1, kind]:
            out[-1][1] = code
        elif kind:
            out.append([code, code, kind])
    return [number for run in out for number in run]


def table(name: str, comment: str, numbers: Iterable[int]) -> str:
    body = textwrap.fill(",".join(map(str, numbers)).replace(",", ", "), 120).replace(", ", ",")
    return f"// {comment}\nstatic const int32_t {name}[] = {{\n{body}}};\n"


def write(name: str, *tables: str) -> None:
    head = (
        f"// {name}: written by tools/build/make_unicode_tables.py from Unicode {unicodedata.unidata_version}; "
        "do not edit.\n// clang-format off\n"
    )
    (NATIVE / name).write_text(head + "".join(tables) + "// clang-format on\n", encoding="ascii")


def main() -> int:
    write(
        "unicode-classes.inc",
        table("LETTERS", "general category L: first, last", ranges(lambda c: unicodedata.category(c)[0] == "L")),
        table("NUMBERS", "general category N: first, last", ranges(lambda c: unicodedata.category(c)[0] == "N")),
        table("LOWER", "lower case: first, last, step, difference", lower_runs()),
    )
    pairs, excluded, single = decompositions()
    write(
        "unicode-forms.inc",
        table("PAIRS", "canonical composition: composed, first, second", pairs),
        table("EXCLUDED", "decomposed, but never composed again: composed, first, second", excluded),
        table("SINGLE", "canonical equivalents of one code point: from, to", single),
        table("COMBINING", "canonical combining class: first, last, class", combining_classes()),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
