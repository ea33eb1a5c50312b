"""Headers of GGUF files that lie elsewhere, as files of this machine: what reads headers only need not know.

ggml's own reader asks for the bytes (``_core.gguf_header``), so no more is fetched than the header has. The file that
stands in for the far one has the header's bytes, and a hole where the tensors' data would be: that reads as zeros, and
takes no room on the disk.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qap_gguf import _core
from qap_gguf.errors import ModelFileError
from qap_gguf.files.parts import part_names
from qap_gguf.files.web import WebFile

__all__ = ["FarHeader", "fetch_header", "part_urls", "read_header", "stand_in"]

MOST: Final = 64 << 20  # bytes of a header; the largest vocabularies take a quarter of that
_MAGIC: Final = b"GGUF"


@dataclass(frozen=True)
class FarHeader:
    """The header of a far file.

    Attributes:
        data: its bytes, up to the tensors' data.
        n_data: bytes of the tensors' data, as the header has it.
        size: bytes of the file, None where the server does not tell.
        n_read: bytes that were transferred for it.
    """

    data: bytes
    n_data: int
    size: int | None
    n_read: int


def read_header(file: WebFile) -> FarHeader:
    """The header of a far GGUF file.

    Raises:
        ModelFileError: another kind of file, damaged, or not to be had.
    """
    try:
        if file.more(len(_MAGIC))[: len(_MAGIC)] != _MAGIC:
            kind = f" ({file.kind})" if file.kind else ""
            cure = "give the address of the .gguf file itself, or of a repository on the hub its id, owner/name"
            if "/blob/" in file.name:
                cure = "give the file's own address, with /resolve/ instead of /blob/"
            raise ModelFileError(f"expected a GGUF file, got another kind{kind} at {file.name}; {cure}")
        most = MOST if file.size is None else min(MOST, file.size)
        try:
            begin, n_data = _core.gguf_header(file.more, most)
        except ModelFileError:
            raise
        except ValueError as err:
            raise ModelFileError(
                f"expected a GGUF header in the first {most} bytes of {file.name}, got one damaged, longer or cut "
                "short; take another file"
            ) from err
        return FarHeader(file.more(begin)[:begin], n_data, file.size, file.n_read)
    finally:
        file.close()


def stand_in(header: FarHeader, path: Path, name: str) -> None:
    """Write the header to `path`, in a file as long as the far one; where that is longer than its tensors, as these.

    Raises:
        ModelFileError: no disk takes a file of that length.
    """
    end = len(header.data) + header.n_data
    try:
        with path.open("xb") as file:
            file.write(header.data)
            file.truncate(end if header.size is None else min(end, header.size))
    except (OSError, OverflowError) as err:
        why = getattr(err, "strerror", None) or err
        raise ModelFileError(
            f"expected a file that a disk can take, {name} says that it has {end} bytes ({why}); take another, or set "
            "TMPDIR to another disk"
        ) from err


def part_urls(url: str) -> list[str]:
    """The addresses of all parts of a model whose first part is at `url`; that one alone where it has no parts.

    Example:
        >>> part_urls("https://example/a-00001-of-00002.gguf?x=1")[1]
        'https://example/a-00002-of-00002.gguf?x=1'
    """
    parts = urllib.parse.urlsplit(url)
    paths = part_names(parts.path)
    return [url] if len(paths) == 1 else [parts._replace(path=path).geturl() for path in paths]


def fetch_header(
    parts: Sequence[tuple[str, str]],
    folder: Path,
    *,
    headers: Mapping[str, str] | None = None,
    allow_http: bool = False,
) -> tuple[Path, int, int | None]:
    """A stand-in for a far file, in an empty folder.

    Args:
        parts: names, for messages, and addresses of its parts in order; a whole file is one part.
        folder: where the stand-ins of the parts go.
        headers: of each request.
        allow_http: see :class:`qap_gguf.files.web.WebFile`.

    Returns:
        The first part's path, the bytes that were transferred, and the bytes of all parts where servers tell them.

    Raises:
        ModelFileError: one of them is no GGUF file, or not to be had.
    """
    names = part_names(f"file-00001-of-{len(parts):05}.gguf") if len(parts) > 1 else ["file.gguf"]
    paths: list[Path] = []
    found: list[FarHeader] = []
    for (name, url), local in zip(parts, names, strict=True):
        found.append(read_header(WebFile(url, name=name, headers=headers, allow_http=allow_http, most=MOST)))
        # the far name goes into no path; llama.cpp finds parts by this one
        paths.append(folder / local)
        stand_in(found[-1], paths[-1], name)
    sizes = [header.size for header in found if header.size is not None]
    return paths[0], sum(header.n_read for header in found), sum(sizes) if len(sizes) == len(found) else None
