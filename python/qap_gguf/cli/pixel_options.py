"""The options that look at the pixels of a picture before it is encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

PIXEL_OPTIONS: Final[dict[str, Callable[[Any], Any]]] = {
    "skip_flat_tiles": click.option(
        "--skip-flat-tiles",
        type=click.IntRange(0, 255),
        metavar="L",
        help="Do not encode tiles whose pixels differ from one colour by at most L of 255. [default: encode all]",
    ),
    "duplicates": click.option(
        "--duplicates",
        type=click.IntRange(0, 255),
        metavar="L",
        help="Leave tokens out of the encoder whose pixels differ from an earlier one's by at most L of 255. "
        "[default: none]",
    ),
}
