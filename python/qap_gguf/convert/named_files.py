"""The files that a name stands for: a path, an address of the web, or a hub id, which stands for two.

Of far files the header is fetched, no more (files/far.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qap_gguf.errors import ModelFileError
from qap_gguf.files.far import fetch_header, part_urls
from qap_gguf.files.hub import find_pair, is_id, split_id
from qap_gguf.files.web import is_url, shown

__all__ = ["NamedFile", "find_files"]


@dataclass(frozen=True)
class NamedFile:
    """A file to look at.

    Attributes:
        name: what it is called: a path, or the words for a far file.
        path: where it is, or where a file with its header and no weights is; None where there is an error.
        error: why there is nothing to look at, else None.
        n_read: bytes that were transferred of a far file, None for files of this machine.
        size: bytes of the far file, None where its server does not tell.
    """

    name: Path | str
    path: Path | None
    error: str | None = None
    n_read: int | None = None
    size: int | None = None

    @property
    def far(self) -> bool:
        """Only its header is here."""
        return self.n_read is not None

    def own_words(self, text: str) -> str:
        """A message about `path` as one about the file."""
        return text.replace(str(self.path), str(self.name)) if self.far else text


def find_files(name: str | Path, new_folder: Callable[[], Path], *, allow_http: bool) -> list[NamedFile]:
    """The files that `name` stands for; what keeps one from being found is in it.

    A path that exists is preferred to an id.

    Args:
        name: a path, an address, or ``owner/name`` or ``owner/name:QUANT`` of the hub.
        new_folder: makes an empty folder, for a far file's header.
        allow_http: see :class:`qap_gguf.files.web.WebFile`.

    Raises:
        ConfigError: an id, and huggingface_hub is not installed.
    """
    if isinstance(name, str) and is_url(name):
        return [_far([(shown(url), url) for url in part_urls(name)], new_folder, {}, allow_http)]
    if not isinstance(name, str) or not is_id(name) or Path(name).exists():
        return [NamedFile(Path(name), Path(name))]
    repo, quant = split_id(name)
    try:
        pair = find_pair(repo, quant=quant)
    except ModelFileError as err:
        return [NamedFile(name, None, str(err))]
    found = []
    for files in (pair.model, (pair.mmproj,)):
        if files[0].path is not None:  # no hub, but its cache
            found.append(NamedFile(files[0].path, files[0].path))
        else:
            found.append(_far([(file.name, file.url) for file in files], new_folder, pair.headers, allow_http))
    return found


def _far(
    parts: Sequence[tuple[str, str]], new_folder: Callable[[], Path], headers: Mapping[str, str], allow_http: bool
) -> NamedFile:
    name = parts[0][0]
    try:
        path, n_read, size = fetch_header(parts, new_folder(), headers=headers, allow_http=allow_http)
    except ModelFileError as err:
        return NamedFile(name, None, str(err))
    return NamedFile(name, path, None, n_read, size)
