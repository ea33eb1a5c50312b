"""A look at GGUF files before upstream maps them: missing, damaged, swapped and hostile files are named in one line.

ggml's own reader parses the header (it refuses malformed ones). What upstream's loaders answer with an abort (shapes,
types and numbers that contradict each other) is refused by native/src/gate before they see the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf import _core
from qap_gguf.arguments import one_line
from qap_gguf.errors import ModelFileError
from qap_gguf.files.parts import part_names
from qap_gguf.files.regular import open_regular


@dataclass(frozen=True)
class GgufInfo:
    """Header of a GGUF file.

    Attributes:
        path: the file.
        metadata: key to value; arrays (vocabularies, mostly) are None.
        tensors: name to (ggml type name, size in bytes).
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, int]]


def read_gguf(path: str | os.PathLike[str]) -> GgufInfo:
    """Read a header and check that the file holds all its tensors.

    Raises:
        ModelFileError: no such file, not GGUF, damaged, or cut short.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.files.gguf import read_gguf
        >>> read_gguf(qap.packaged_model().mmproj).metadata["general.architecture"]
        'clip'
    """
    path = Path(path)
    size = _look(path)
    try:
        metadata, tensors, data_offset = _core.gguf_info(str(path))
    except ValueError as err:
        raise ModelFileError(f"expected a whole GGUF file, {path} is damaged or cut short; fetch it again") from err
    if not tensors:
        raise ModelFileError(f"expected tensors, found none in {path}; fetch the file again")
    end = max(data_offset + offset + n_bytes for _, _, offset, n_bytes in tensors)
    if end > size:
        raise ModelFileError(f"expected {end} bytes, got {size}: {path} is cut short; fetch it again")
    return GgufInfo(path, metadata, {name.decode("utf-8", "replace"): (kind, n) for name, kind, _, n in tensors})


def model_parts(path: Path) -> list[Path]:
    """All files of a model in several, whose first file is `path`; that one alone otherwise.

    Example:
        >>> [part.name for part in model_parts(Path("a-00001-of-00002.gguf"))]
        ['a-00001-of-00002.gguf', 'a-00002-of-00002.gguf']
    """
    return [path.with_name(name) for name in part_names(path.name)]


def _look(path: Path) -> int:
    """Bytes of a file that begins as GGUF files do."""
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            magic = file.read(4)
    except (OSError, ValueError) as err:  # ValueError: a null character in the path
        why = err.strerror if isinstance(err, OSError) else err
        raise ModelFileError(f"expected a GGUF file, cannot open {str(path)!r} ({why}); check the path") from err
    if magic != b"GGUF":
        raise ModelFileError(f"expected a GGUF file, got another kind at {path}; pass the .gguf file")
    return size


def _gate(path: str | os.PathLike[str], check: Callable[[str], int | None]) -> int | None:
    try:
        return check(str(path))
    except ValueError as err:
        raise ModelFileError(f"{one_line(err)} ({path})") from err


def check_mmproj(path: str | os.PathLike[str], *, memory: bool = True) -> int | None:
    """Check an mmproj file: whole, a vision encoder, and free of contradictions on which upstream would abort.

    Args:
        path: the file.
        memory: refuse what this machine has no room for.

    Returns:
        The width of its tokens, None for kinds of projector that get the general checks only.

    Raises:
        ModelFileError: missing, damaged, another kind of file, at odds with itself, or too large for the memory.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.files.gguf import check_mmproj
        >>> check_mmproj(qap.packaged_model().mmproj)
        256
    """
    check_vision(read_gguf(path))
    return _gate(path, lambda name: _core.check_mmproj(name, memory))


def check_language(path: str | os.PathLike[str], n_ctx: int = 0, *, memory: bool = True) -> int | None:
    """Check a language model's file in the same way.

    Args:
        path: the file.
        n_ctx: cells of the KV cache that is to fit the memory; 0 is the model's own context.
        memory: refuse what this machine has no room for.

    Returns:
        The width of its tokens.

    Raises:
        ModelFileError: missing, damaged, another kind of file, at odds with itself, or too large for the memory.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.files.gguf import check_language
        >>> check_language(qap.packaged_model().model)
        256
    """
    _look(Path(path))  # no more: the header holds a vocabulary, which takes its time to read
    return _gate(path, lambda name: _core.check_language(name, memory, n_ctx))


def check_pair(
    mmproj: str | os.PathLike[str], model: str | os.PathLike[str] | None, n_ctx: int = 0, *, memory: bool = True
) -> None:
    """Check `mmproj` and `model` (None: not a file) and that the tokens of the one fit the other.

    Raises:
        ModelFileError: one of them cannot be used, or they do not belong together.
    """
    width = check_mmproj(mmproj, memory=memory)
    if model is None:
        return
    wanted = check_language(model, n_ctx, memory=memory)
    if width is not None and wanted is not None and width != wanted:
        raise ModelFileError(
            f"expected tokens of {wanted} numbers ({model}), got {width} ({mmproj}); pass the mmproj of this model"
        )


def check_vision(info: GgufInfo) -> None:
    """Check that a file is an mmproj with a vision encoder.

    Raises:
        ModelFileError: it is another kind of file.
    """
    if info.metadata.get("general.architecture") != "clip":
        raise ModelFileError(
            f"expected an mmproj file, got a language model at {info.path} "
            f"(architecture {info.metadata.get('general.architecture')}); pass the mmproj-*.gguf of the model"
        )
    if info.metadata.get("clip.has_vision_encoder") is not True:
        raise ModelFileError(f"expected a vision encoder, {info.path} has none; pass the mmproj of a vision model")
