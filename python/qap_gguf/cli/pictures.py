"""What may stand for a picture on the command line: a file, a pattern of names, ``-`` for stdin, an address.

A shell expands patterns itself, unless they are quoted or it finds nothing; then they come here as they are.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qap_gguf.cli.common import note
from qap_gguf.files.packaged import packaged_model

if TYPE_CHECKING:
    from qap_gguf.vision.images import ImageSource

_MAGIC = frozenset("*?[")


def allow_urls_option(function: click.decorators.FC) -> click.decorators.FC:
    """Add --allow-urls; the command takes it as `allow_urls`."""
    return click.option("--allow-urls", is_flag=True, help="Fetch pictures from http and https addresses.")(function)


def find_pictures(words: Sequence[str], allow_urls: bool) -> list[tuple[str, ImageSource]]:
    """Each picture with its name, in the order of the words; those of a pattern in the order of their names.

    Raises:
        click.UsageError: an address without --allow-urls, a pattern that fits no file, or stdin twice.
        ImageError: an address that cannot be fetched, a data URI that is none.
    """
    from qap_gguf.vision.images import MAX_BYTES
    from qap_gguf.vision.sources import SourceRules

    rules = SourceRules(allow_urls=True, allow_private=True, max_bytes=MAX_BYTES)  # the user's own wish
    found: list[tuple[str, ImageSource]] = []
    for word in words:
        scheme = word.partition(":")[0].lower() if ":" in word[:16] else ""
        if word == "-":
            if any(name == "-" for name, _ in found):
                raise click.UsageError("--image -: stdin has one picture; give it once")
            found.append((word, sys.stdin.buffer.read(MAX_BYTES + 1)))
        elif scheme in ("http", "https"):
            if not allow_urls:
                raise click.UsageError(f"{word[:80]}: addresses are fetched with --allow-urls only; add it")
            found.append((word, rules.fetch(word)))
        elif scheme in ("data", "file"):
            found.append((word[:40], rules.fetch(word)))
        elif _MAGIC & set(word) and not Path(word).exists():
            matches = glob.glob(word, recursive=True)  # noqa: PTH207 (an absolute pattern too)
            names = sorted(name for name in matches if Path(name).is_file())
            if not names:
                raise click.UsageError(f"{word}: expected a picture's file, the pattern fits none; check it")
            found += [(name, Path(name)) for name in names]
        else:
            found.append((word, Path(word)))
    return found


def one_picture(word: str | None, allow_urls: bool) -> tuple[str, ImageSource]:
    """The picture of a command that takes one, with its name; the packaged sample where none was named, and a note.

    Raises:
        click.UsageError, ImageError: see :func:`find_pictures`; a pattern that fits several.
    """
    if word is None:
        word = str(packaged_model().sample)
        note(f"no IMAGE, so this is about the packaged sample {word}")
    pictures = find_pictures([word], allow_urls)
    if len(pictures) > 1:
        raise click.UsageError(f"{word}: expected one picture, the pattern fits {len(pictures)}; name one")
    return pictures[0]
