"""A look at GGUF files before upstream maps them: missing, cut short and swapped files are named in one line.

ggml's own reader parses the header (it refuses malformed ones); what it does not check without the data is whether
every tensor lies inside the file, and a language model that reads past the end takes the process down.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf import _core
from qap_gguf.errors import ModelFileError


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
        >>> from qap_gguf.files import read_gguf
        >>> read_gguf(qap.packaged_model().mmproj).metadata["general.architecture"]
        'clip'
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except (OSError, ValueError) as err:  # ValueError: a null character in the path
        why = err.strerror if isinstance(err, OSError) else err
        raise ModelFileError(f"expected a GGUF file, cannot open {str(path)!r} ({why}); check the path") from err
    if magic != b"GGUF":
        raise ModelFileError(f"expected a GGUF file, got another kind at {path}; pass the .gguf file")
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


def check_pair(mmproj: str | os.PathLike[str], model: str | os.PathLike[str] | None) -> None:
    """Check that `mmproj` is a vision encoder and `model` (None: not a file) a language model.

    Raises:
        ModelFileError: one of them is missing, damaged, or the other kind of file.
    """
    check_vision(read_gguf(mmproj))
    if model is not None:
        language = read_gguf(model)
        if language.metadata.get("general.architecture") == "clip":
            raise ModelFileError(f"expected a language model, got an mmproj at {model}; pass the model's .gguf file")


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
