"""What may stand for an image in a chat message, and the rules about where images may come from.

OpenAI's form is a URL: ``data:`` with the bytes in it, or an address of the web. Beside it go what people hold in their
hands: a path, the bytes of a file, a Pillow image, an array, an image that is encoded already. Addresses are fetched
only where a rule allows it (:mod:`qap_gguf.vision.fetch`).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from qap_gguf.arguments import check_integer
from qap_gguf.errors import ConfigError, ImageError
from qap_gguf.files.regular import read_regular
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.fetch import fetch
from qap_gguf.vision.images import ImageSource, Pixels, load_image

#: An image of a message: encoded already, or something that :meth:`SourceRules.load` turns into pixels.
ChatImage: TypeAlias = "ImageSource | ImageEmbedding"

#: Formats that browsers show, and the old ones of Windows.
WEB_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "AVIF")

#: Base64 (or its form for URLs) as it comes without a head; a path has a point or a space in it, or is shorter.
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{64,}={0,2}")

_KINDS = (bytes, bytearray, os.PathLike, Image.Image, np.ndarray, ImageEmbedding)


def _known(formats: tuple[str, ...]) -> list[str]:
    Image.init()
    return [name for name in formats if name in Image.OPEN]


def is_image(part: object) -> bool:
    """Whether a bare part of a message (not a dict, not a str) can be an image."""
    return isinstance(part, _KINDS)


@dataclass(frozen=True)
class SourceRules:
    """Where images of messages may come from, and how large they may be.

    Attributes:
        allow_files: paths and ``file:`` URLs, for a program that asks for itself; never for requests from a network.
        allow_urls: ``http:`` and ``https:`` URLs.
        allow_private: URLs that lead to this machine or to private networks; needs ``allow_urls``.
        max_bytes: largest image file, from wherever it comes.
        max_pixels: largest picture; Pillow's own limit holds as well.
        max_images: most images of one call.
        formats: Pillow's names of the file formats that are read. Some of its readers start other programs, or are
            hardly used by anyone; such files are refused.
        timeout_s: longest time for fetching one URL.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.

    Example:
        >>> SourceRules(allow_files=False).load("photo.jpg")
        Traceback (most recent call last):
        qap_gguf.errors.ImageError: image: expected a data URI, got a path; files are not read here, send the bytes
    """

    allow_files: bool = True
    allow_urls: bool = False
    allow_private: bool = False
    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 64
    formats: tuple[str, ...] = (*WEB_FORMATS, "TIFF", "PPM")
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("allow_files", "allow_urls", "allow_private"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}; choose one")
        for name in ("max_bytes", "max_pixels", "max_images"):
            check_integer(name, getattr(self, name), 1, 2**40)
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, (int, float)) or not self.timeout_s > 0:
            raise ConfigError(f"timeout_s: expected seconds above 0, got {self.timeout_s!r}; choose such a number")

    def load(self, source: ImageSource) -> Pixels:
        """The picture as uint8 RGB (height, width, 3).

        Raises:
            ImageError: not allowed, not to be had, not a picture, or too large.
        """
        if isinstance(source, str):
            source = self.fetch(source)
        if isinstance(source, bytearray):
            source = bytes(source)
        if isinstance(source, os.PathLike):
            source = self._from_file(Path(source))
        if isinstance(source, bytes):
            self._check_bytes(len(source))
        return load_image(source, max_pixels=self.max_pixels, formats=_known(self.formats))

    def _check_bytes(self, n_bytes: int) -> None:
        if n_bytes > self.max_bytes:
            raise ImageError(f"image: expected at most {self.max_bytes} bytes, got {n_bytes}; send a smaller file")

    def fetch(self, text: str) -> bytes:
        """The bytes of the file that a data URI, a URL or a path stands for.

        Raises:
            ImageError: not allowed, not to be had, or too large.
        """
        scheme = text.split(":", 1)[0].lower() if ":" in text[:16] else ""
        if scheme == "data":
            # four characters of base64 are three bytes; the text is refused before it is decoded
            self._check_bytes(len(text) * 3 // 4 - 1024)
            return decode_data_uri(text)
        if scheme in ("http", "https"):
            if not self.allow_urls:
                raise ImageError("image: expected a data URI or a file, got a URL; URLs are not fetched here")
            return fetch(text, max_bytes=self.max_bytes, timeout_s=self.timeout_s, allow_private=self.allow_private)
        if scheme == "file":
            parts = urllib.parse.urlsplit(text)
            if parts.netloc not in ("", "localhost"):
                raise ImageError(f"image: expected a file of this machine, got {text[:80]!r}; give its path")
            return self._from_file(Path(urllib.parse.unquote(parts.path)))
        if _BASE64.fullmatch(text.rstrip()) and not (self.allow_files and _is_file(text)):
            raise ImageError(
                "image: expected a data URI, got base64 without its head; put data:image/png;base64, before it"
            )
        return self._from_file(Path(text))

    def _from_file(self, path: Path) -> bytes:
        if not self.allow_files:
            raise ImageError("image: expected a data URI, got a path; files are not read here, send the bytes")
        try:
            if not path.is_file():
                raise ImageError(f"image: expected a file, found none at {str(path)[:200]!r}; check the path")
            self._check_bytes(path.stat().st_size)
            return read_regular(path)
        except (OSError, ValueError) as err:  # ValueError: a null character; ImageError is one too and has its words
            if isinstance(err, ImageError):
                raise
            why = getattr(err, "strerror", None) or err
            raise ImageError(f"image: cannot read {str(path)[:200]!r} ({why}); check the path") from err


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name
        return False


def decode_data_uri(text: str) -> bytes:
    """The bytes of a ``data:`` URI, base64 or percent-encoded.

    Raises:
        ImageError: no comma, or not base64 where it says so.

    Example:
        >>> decode_data_uri("data:image/png;base64,iVBORw0=")
        b'\\x89PNG\\r'
    """
    head, comma, body = text.partition(",")
    if not comma:
        raise ImageError("image: expected data:TYPE;base64,BYTES, got no comma; check the URI")
    if not head.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as err:
        raise ImageError(f"image: expected base64 after the comma, got other text ({err}); encode it again") from err
