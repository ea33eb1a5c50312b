"""Writes, changes or removes the `qap.*` keys of an mmproj file that exists; every other byte is copied."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import gguf

from qap_gguf import _core
from qap_gguf.arguments import one_line
from qap_gguf.config import METADATA_TYPES, WEIGHTS_KEY, PruneConfig
from qap_gguf.convert.mmproj_header import mmproj_facts
from qap_gguf.convert.output.disk_space import require_space, writing
from qap_gguf.convert.output.imatrix import Imatrix, channel_weights
from qap_gguf.convert.output.raw_header import COUNTS, Layout, cut, pack_key, pack_text, read_layout
from qap_gguf.convert.output.writer import OutputFolder
from qap_gguf.defaults import check_weights
from qap_gguf.errors import ConfigError, ConvertError, ModelFileError, UnsupportedError
from qap_gguf.files.gguf import GgufInfo, check_vision, read_gguf

__all__ = ["annotate"]

_PREFIX = "qap."
_STEP = 4 << 20  # bytes that are copied at once


def annotate(
    src: str | Path,
    out: str | Path,
    prune: PruneConfig | None,
    *,
    imatrix: str | Path | Imatrix | None = None,
    force: bool = False,
) -> Path:
    """Copies the mmproj file `src` to `out` with `prune` as its pruning defaults; None removes the defaults.

    All other keys keep their bytes and their order, all tensors theirs. The `qap.*` keys come last. `out` may be `src`
    (with force): the file is replaced in one step when the new one is whole. Channel weights that the file has stay.

    src: an mmproj file with a vision encoder. out: the file to write, in a folder that exists or can be made.
    prune: stored as the defaults of whoever loads the file; `seed` is not among them.
    imatrix: an importance matrix of the language model, whose :func:`channel_weights` go into the file.
    force: replace `out` if it is there.

    Returns `out`. Memory stays at some MB, whatever the size of the file. Raises ModelFileError if `src` is no whole
    mmproj file, ConfigError or UnsupportedError if its model cannot have these defaults, ConvertError if `imatrix` is
    of another model or `out` cannot be written; then `out` is as it was.

    Example:
        >>> import tempfile
        >>> import qap_gguf as qap
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = qap.annotate(qap.packaged_model().mmproj, f"{folder}/new.gguf", qap.PruneConfig(n_keep=18))
        ...     qap.PruneConfig.from_metadata(read_gguf(path).metadata).n_keep
        18
    """
    source, target = Path(src), Path(out)
    info = read_gguf(source)
    _check(info, prune, imatrix)
    layout = read_layout(source)
    own = [] if prune is None else [_key(name, item) for name, item in prune.to_metadata().items()]
    if imatrix is not None:
        own.append(_weights_key(source, imatrix))
    elif prune is not None and WEIGHTS_KEY in info.metadata:
        with source.open("rb") as old:
            own += [cut(old, key.begin, key.end) for key in layout.keys if key.name == WEIGHTS_KEY]
    with OutputFolder(target.parent, force) as folder:
        folder.check(target)
        require_space(folder.folder, layout.size + sum(map(len, own)) + layout.alignment)
        new = folder.temp(target)
        with writing(folder.folder), source.open("rb") as old, new.open("wb") as file:
            for piece in _pieces(old, layout, own):
                file.write(piece)
        if prune is not None:
            _check_loads(new, source)
        new.chmod(source.stat().st_mode & 0o777)
        folder.commit((new, target))
    return target


def _check(info: GgufInfo, prune: PruneConfig | None, imatrix: str | Path | Imatrix | None) -> None:
    """`info` is an mmproj with a vision encoder whose model can do what `prune` asks."""
    check_vision(info)
    if prune is None:
        if imatrix is not None:
            raise ConfigError(
                "imatrix: expected defaults beside it, got None for prune; give them, or leave imatrix out"
            )
        return
    check_weights(prune, imatrix is not None or WEIGHTS_KEY in info.metadata, info.path)
    facts = mmproj_facts(info)
    if prune.semantic == "clip_text" and not facts.text_tower:
        raise ConfigError(
            f"semantic: expected CLIP's text tower in {info.path} for clip_text, found none; "
            "convert the model with clip_text=... (--clip-text), or choose another signal"
        )
    if prune.semantic == "cls" and not facts.class_token:
        raise ConfigError(
            f"semantic: expected a class token in {info.path} for cls, found none; choose attention, text or auto"
        )


def _check_loads(new: Path, source: Path) -> None:
    """libmtmd opens the file that was written, our keys included, and can prune its images."""
    try:
        why_not = _core.inspect_mmproj(str(new), None)["why_not"]
    except RuntimeError as err:
        reason = " ".join(str(err).split()).replace(str(new), str(source))
        raise ModelFileError(
            f"expected an mmproj that libmtmd loads, got a refusal ({reason}); convert it anew"
        ) from err
    if why_not:
        raise UnsupportedError(f"expected a model whose images can be pruned, got {source}: {why_not}")


def _pieces(old: IO[bytes], layout: Layout, own: list[bytes]) -> Iterator[bytes]:
    """The new file from its start to its end."""
    magic, version, n_tensors, _ = COUNTS.unpack(old.read(COUNTS.size))
    others = [key for key in layout.keys if not key.name.startswith(_PREFIX)]
    written = 0
    for piece in (
        COUNTS.pack(magic, version, n_tensors, len(others) + len(own)),
        *(cut(old, key.begin, key.end) for key in others),
        *own,
        cut(old, *layout.entries),
    ):
        written += len(piece)
        yield piece
    yield b"\0" * (-written % layout.alignment)
    for begin in range(layout.data, layout.size, _STEP):
        yield cut(old, begin, min(begin + _STEP, layout.size))


def _weights_key(source: Path, imatrix: str | Path | Imatrix) -> bytes:
    """The key with the weights of `imatrix`, which is of the language model that `source` belongs to."""
    weights = channel_weights(imatrix)
    try:
        n_channels = int(_core.inspect_mmproj(str(source), None)["n_channels"])
    except RuntimeError as err:
        raise ModelFileError(
            f"expected an mmproj that libmtmd loads, got a refusal ({one_line(err)}); convert it anew"
        ) from err
    if weights.size != n_channels:
        path = imatrix.path if isinstance(imatrix, Imatrix) else imatrix
        raise ConvertError(
            f"expected an imatrix of a language model whose tokens have {n_channels} channels, got {weights.size} in "
            f"{path}; give the file of the model that {source} belongs to"
        )
    head = struct.pack("<IQ", gguf.GGUFValueType.FLOAT32, weights.size)
    return pack_key(WEIGHTS_KEY, gguf.GGUFValueType.ARRAY, head + weights.astype("<f4").tobytes())


def _key(name: str, item: Any) -> bytes:
    """One of our keys as GGUF stores it."""
    kind = METADATA_TYPES[name]
    if kind == "string":
        return pack_key(name, gguf.GGUFValueType.STRING, pack_text(item))
    if kind == "f32":
        return pack_key(name, gguf.GGUFValueType.FLOAT32, struct.pack("<f", item))
    if kind == "bool":
        return pack_key(name, gguf.GGUFValueType.BOOL, struct.pack("<?", item))
    return pack_key(name, gguf.GGUFValueType.UINT32, struct.pack("<I", item))
