"""Writes an mmproj file that exists with its matrices in another type; keys and all other tensors are copied.

Only weights that the encoder's graph uses for nothing but matrix products change (native/src/repack.h finds them): a
matrix that is looked up by rows, added, cut or transposed stays as it is, and so do vectors, filters and what no graph
of the encoder reads. Values go through f32 by ggml's own conversions, some rows at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gguf

from qap_gguf import _core
from qap_gguf.arguments import one_line
from qap_gguf.convert.output.disk_space import require_space, writing
from qap_gguf.convert.output.raw_header import COUNTS, Layout, Tensor, cut, pack_key, pack_text, read_layout
from qap_gguf.convert.output.writer import OutputFolder
from qap_gguf.errors import ConvertError, ModelFileError, UnsupportedError
from qap_gguf.files.gguf import GgufInfo, check_mmproj, read_gguf

__all__ = ["REQUANTIZE_TYPES", "Requantized", "requantize"]

Progress = Callable[[int, int, str], None]
#: Type of the matrices -> general.file_type.
REQUANTIZE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "iq4_nl": 25}
_SOURCES = ("f32", "f16", "bf16", "q8_0")  # what is worth to be rounded once more
_FLOATS = ("f32", "f16", "bf16")
_FILE_TYPE, _VERSION = "general.file_type", "general.quantization_version"
_STEP = 1 << 20  # values that are converted at once


@dataclass(frozen=True)
class Requantized:
    """The file that was made; `changed` of its matrices have another type, `notes` are lines about the others."""

    path: Path
    changed: int
    notes: tuple[str, ...] = ()


def requantize(
    src: str | Path, out: str | Path, mmproj_type: str, *, force: bool = False, progress: Progress | None = None
) -> Requantized:
    """Copies the mmproj file `src` to `out` with the matrices of its image encoder in another type.

    src: an mmproj file whose images can be pruned, with matrices in f32, f16, bf16 or q8_0.
    out: the file to write, in a folder that exists or can be made; it may be `src` (with force).
    mmproj_type: "f32", "f16", "bf16", "q8_0", "q4_0" or "iq4_nl". Matrices whose rows are not made of whole blocks of
        32 stay as they are, which a note says.
    force: replace `out` if it is there. progress: called as progress(done, total, name) after each tensor.

    Memory stays at some MB. Raises ModelFileError if `src` is no whole mmproj file, UnsupportedError if its encoder is
    not among those that are known here, ConvertError if the type is unknown, if its matrices have fewer bits than q8_0,
    if a value does not fit the type, or if `out` cannot be written; then `out` is as it was.

    Example:
        >>> import tempfile
        >>> import qap_gguf as qap
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = qap.requantize(qap.packaged_model().mmproj, f"{folder}/mmproj-q8_0.gguf", "q8_0")
        ...     read_gguf(made.path).tensors["v.blk.0.attn_q.weight"][0]
        'q8_0'
    """
    source, target, kind = Path(src), Path(out), str(mmproj_type).lower()
    if kind not in REQUANTIZE_TYPES:
        raise ConvertError(
            f"expected mmproj_type {', '.join(REQUANTIZE_TYPES)}, got {mmproj_type!r}; choose one of these"
        )
    check_mmproj(source, memory=False)
    info, layout = read_gguf(source), read_layout(source)
    new_types, notes = _choose(info, layout, kind)
    plan = [_Entry(tensor, info.tensors[tensor.name][0], new_types.get(tensor.name)) for tensor in layout.tensors]
    with OutputFolder(target.parent, force) as folder:
        folder.check(target)
        require_space(folder.folder, layout.data + sum(entry.nbytes + layout.alignment for entry in plan))
        new = folder.temp(target)
        with writing(folder.folder), source.open("rb") as old, new.open("wb") as file:
            _write(old, file, layout, plan, kind, progress)
        _check_loads(new, source)
        new.chmod(source.stat().st_mode & 0o777)
        folder.commit((new, target))
    return Requantized(target, len(new_types), notes)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the old file, the name of its ggml type there, and of its new one (None: the same bytes)."""

    tensor: Tensor
    old: str
    new: str | None

    @property
    def kind(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType[(self.new or self.old).upper()]

    @property
    def nbytes(self) -> int:
        if self.new is None:
            return self.tensor.nbytes
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        n_values = 1
        for n in self.tensor.shape:
            n_values *= n
        return n_values // block * size


def _choose(info: GgufInfo, layout: Layout, kind: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """New types by tensor, and notes."""
    try:
        products = set(_core.mmproj_products(str(info.path)))
    except RuntimeError as err:
        raise ModelFileError(
            f"expected an mmproj that libmtmd loads, got a refusal ({one_line(err)}); convert it anew"
        ) from err
    if not products:
        raise UnsupportedError(
            f"expected an image encoder that is known here (docs/models.md), got another in {info.path}; "
            "convert its checkpoint to the type instead"
        )
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][0]
    chosen, odd, rounded = {}, [], 0
    for tensor in layout.tensors:
        old = info.tensors[tensor.name][0]
        if tensor.name not in products or old == kind:
            continue
        if old not in _SOURCES:
            raise ConvertError(
                f"expected matrices in {', '.join(_SOURCES)}, got {tensor.name} in {old} in {info.path}; "
                "give the file that it was made from"
            )
        if tensor.shape[0] % block:
            odd.append(tensor.name)
            continue
        rounded += old not in _FLOATS
        chosen[tensor.name] = kind
    notes = []
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        notes.append(f"left as they were, rows are no multiple of {block}: {odd[0]}{more}")
    if rounded:
        notes.append(f"{rounded} matrices were rounded before, to q8_0; a float file gives a little more")
    return chosen, tuple(notes)


def _write(
    old: IO[bytes], file: IO[bytes], layout: Layout, plan: list[_Entry], kind: str, progress: Progress | None
) -> None:
    head = b"".join(_head(old, layout, plan, kind))
    file.write(head)
    file.write(b"\0" * (-len(head) % layout.alignment))
    for done, entry in enumerate(plan, 1):
        for piece in _values(old, entry):
            file.write(piece)
        file.write(b"\0" * (-entry.nbytes % layout.alignment))
        if progress is not None:
            progress(done, len(plan), entry.tensor.name)


def _head(old: IO[bytes], layout: Layout, plan: list[_Entry], kind: str) -> Iterator[bytes]:
    """Everything in front of the padding and the data."""
    others = [key for key in layout.keys if key.name not in (_FILE_TYPE, _VERSION)]
    magic, version, n_tensors, _ = COUNTS.unpack(cut(old, 0, COUNTS.size))
    yield COUNTS.pack(magic, version, n_tensors, len(others) + 2)
    for key in others:
        yield cut(old, key.begin, key.end)
    for name, number in ((_FILE_TYPE, REQUANTIZE_TYPES[kind]), (_VERSION, gguf.GGML_QUANT_VERSION)):
        yield pack_key(name, gguf.GGUFValueType.UINT32, struct.pack("<I", number))
    offset = 0
    for entry in plan:
        shape = entry.tensor.shape
        yield pack_text(entry.tensor.name)
        yield struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, entry.kind, offset)
        offset += entry.nbytes + -entry.nbytes % layout.alignment


def _values(old: IO[bytes], entry: _Entry) -> Iterator[bytes]:
    """The new bytes of a tensor, some rows at a time."""
    tensor = entry.tensor
    width = tensor.shape[0]
    row = tensor.nbytes * width // _count(tensor)
    step = max(_STEP // width, 1) * row
    end = tensor.begin + tensor.nbytes
    for begin in range(tensor.begin, end, step):
        piece = cut(old, begin, min(begin + step, end))
        if entry.new is None:
            yield piece
            continue
        try:
            yield _core.convert_rows(piece, entry.old, entry.new, width)
        except ValueError as err:
            raise ConvertError(f"{tensor.name}: {one_line(err)}; choose another type") from err


def _count(tensor: Tensor) -> int:
    n_values = 1
    for n in tensor.shape:
        n_values *= n
    return n_values


def _check_loads(new: Path, source: Path) -> None:
    """What was written must be what libmtmd loads."""
    try:
        check_mmproj(new, memory=False)
        _core.inspect_mmproj(str(new), None)
    except (ModelFileError, RuntimeError) as err:
        reason = one_line(err).replace(str(new), str(source))
        raise ConvertError(
            f"expected an mmproj that libmtmd loads in this type, got a refusal ({reason}); choose another type"
        ) from err
