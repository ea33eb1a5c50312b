"""`relabel`: a copy of a language model's file under the name of an architecture with M-RoPE, and back."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gguf

from qap_gguf import _core
from qap_gguf.convert.output.disk_space import require_space, writing
from qap_gguf.convert.output.raw_header import COUNTS, Layout, cut, pack_key, pack_text, read_layout
from qap_gguf.convert.output.writer import OutputFolder
from qap_gguf.convert.relabel.rows import halves, pairs
from qap_gguf.convert.relabel.rules import RULES, Change, change_of, has_mrope, head_rows
from qap_gguf.errors import ConvertError, ModelFileError
from qap_gguf.files.gguf import GgufInfo, check_language, read_gguf

__all__ = ["DIGEST", "ORIGIN", "STOCK", "keep_places", "relabel"]

#: keys of a relabelled file: what it was, and the SHA-256 of the file that it was made from
ORIGIN, DIGEST = "qap.origin.architecture", "qap.origin.sha256"
#: what a relabelled file means to other programs
STOCK = "so that kept image tokens stay at their places: stock llama.cpp misplaces the images of such a file, silently"
_NO_DIGEST, _SECTIONS = "0" * 64, "rope.dimension_sections"
_MORE = 4096  # bytes of our keys, more than enough
_STEP = 4 << 20  # bytes that are copied at once

Progress = Callable[[int, int, str], None]


def relabel(
    src: str | Path, out: str | Path, *, undo: bool = False, force: bool = False, progress: Progress | None = None
) -> Path:
    """Copies the language model `src` to `out` so that kept image tokens can stay at their own places.

    A Llama, Mistral, SmolLM, InternLM2, Qwen2 or Qwen3 of any quantization is the same model afterwards: logits are
    equal up to the last bits, for nothing is requantized; q's and k's rows move whole. With the copy,
    ``PruneConfig(positions="keep")`` and "auto" leave the gaps that dropped image tokens leave in the sequence. All
    other keys and the tokenizer keep their bytes and their order.

    src: a GGUF file in one part. out: the file to write, in a folder that exists or can be made; it may be `src` (with
    force), which is then replaced in one step when the new file is whole.
    undo: `src` is a relabelled file; `out` gets the bytes of the file that it was made from, which is checked.
    force: replace `out` if it is there. progress: called as progress(done, total, what), in tensors.

    Returns `out`. Memory stays at some MB and a head's rows. Raises ModelFileError if `src` is no whole language model,
    ConvertError if it cannot be relabelled, with the reason, or `out` cannot be written; then `out` is as it was.

    Example:
        >>> import tempfile
        >>> import qap_gguf as qap
        >>> model = qap.packaged_model().model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plain = relabel(model, f"{folder}/plain.gguf", undo=True)  # the packaged model is relabelled
        ...     again = relabel(plain, f"{folder}/again.gguf")
        ...     again.read_bytes() == model.read_bytes()
        True
    """
    source, target = Path(src), Path(out)
    check_language(source, memory=False)
    info = read_gguf(source)
    layout = read_layout(source)
    with OutputFolder(target.parent, force) as folder:
        folder.check(target)
        require_space(folder.folder, layout.size + _MORE)
        new = folder.temp(target)
        with writing(folder.folder), source.open("rb") as old, new.open("w+b") as file:
            _Copy(info, layout, undo).write(old, file, progress)
        _check_loads(new, source)
        new.chmod(source.stat().st_mode & 0o777)
        folder.commit((new, target))
    return target


def keep_places(source: Path, target: Path, final: Path, *, must: bool) -> tuple[Path, tuple[str, ...]]:
    """Relabels a file that a conversion has just made under a temporary name, to another one, and removes it.

    final: its name in the end, for notes. must: a model that cannot be relabelled is an error; else it stays as it is,
    and a note says why.

    Returns `target`, or `source` where that stays (its image tokens can keep their places as it is, or never), and what
    whoever converts ought to know. Raises ConvertError if it must be relabelled and cannot be, or cannot be written.
    """
    info = read_gguf(source)
    if has_mrope(info):
        return source, ()
    layout = read_layout(source)
    try:
        copy = _Copy(info, layout, undo=False)
    except ConvertError as err:
        if must:
            raise ConvertError(str(err).replace(str(source), str(final))) from err
        reason = str(err).partition("; ")[0].partition(", got ")[2].removesuffix(f" ({source})")
        return source, (
            f"kept image tokens will be renumbered, because the language model cannot be relabelled: {reason}",
        )
    require_space(target.parent, layout.size + _MORE)
    with writing(target.parent), source.open("rb") as old, target.open("w+b") as file:
        copy.write(old, file, None)
    _check_loads(target, source)
    source.unlink()
    return target, (f"{final.name} is relabelled, {STOCK}; --no-keep-positions makes one for both",)


def _check_loads(new: Path, source: Path) -> None:
    """What was written must be what libllama loads."""
    try:
        check_language(new, memory=False)
        _core.inspect_model(str(new))
    except (ModelFileError, RuntimeError) as err:
        reason = " ".join(str(err).replace(str(new), str(source)).split())
        raise ConvertError(
            f"expected a language model that llama.cpp loads, got a refusal ({reason}); leave it as it is"
        ) from err


def _origin(info: GgufInfo, layout: Layout) -> Change:
    """What was done to a relabelled file."""
    keys, target = info.metadata, str(info.metadata.get("general.architecture", ""))
    origin, digest = keys.get(ORIGIN), keys.get(DIGEST)
    if not isinstance(origin, str) or not isinstance(digest, str) or len(digest) != 64:
        raise ConvertError(
            f"expected a relabelled file with the keys qap.origin.*, got {info.path} without; nothing to undo"
        )
    rule = RULES.get(origin)
    if rule is None or rule.target != target:
        raise ConvertError(
            f"expected one of {', '.join(RULES)} as {ORIGIN} of {info.path}, got {origin!r}; fetch it again"
        )
    renamed = [key.name for key in layout.keys if key.name.startswith(f"{target}.")]
    width, heads = keys.get(f"{target}.embedding_length"), keys.get(f"{target}.attention.head_count")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or not renamed:
        raise ModelFileError(f"expected the keys of {target}, {info.path} lacks some; relabel the original anew")
    head_dim = int(keys.get(f"{target}.attention.key_length") or width // heads)
    return Change(origin, target, rule.pairs, head_dim, (0, 0, 0, 0))


@dataclass
class _Copy:
    """One copy from an open file to another."""

    info: GgufInfo
    layout: Layout
    undo: bool

    def __post_init__(self) -> None:
        self.change = _origin(self.info, self.layout) if self.undo else change_of(self.info, self.layout)

    def write(self, old: IO[bytes], file: IO[bytes], progress: Progress | None) -> None:
        """Write the whole file."""
        layout, done = self.layout, 0
        head = b"".join(self._head(old))
        head += b"\0" * (-len(head) % layout.alignment)
        if any(cut(old, layout.entries[1], layout.data)):
            raise ConvertError(f"expected zeros in front of the data of {self.info.path}, got others; convert it anew")
        digest = hashlib.sha256(head if self.undo else cut(old, 0, layout.data))  # of the file with the old name
        file.write(head)
        for name, raw, turned in self._data(old):
            digest.update(turned if self.undo else raw)
            file.write(turned)
            done += bool(name)
            if progress is not None and name:
                progress(done, len(layout.tensors), name)
        if not self.undo:
            file.seek(head.index(_digest_key(_NO_DIGEST)))
            file.write(_digest_key(digest.hexdigest()))
        elif digest.hexdigest() != self.info.metadata[DIGEST]:
            raise ConvertError(
                f"expected the bytes of the original (sha256 {str(self.info.metadata[DIGEST])[:12]}...), got others: "
                f"{self.info.path} was changed after it was relabelled; convert or fetch the original again"
            )

    def _head(self, old: IO[bytes]) -> Iterator[bytes]:
        """Everything in front of the padding and the data."""
        before, after = self.change.origin, self.change.target
        if self.undo:
            before, after = after, before
        dropped = (f"{before}.{_SECTIONS}", ORIGIN, DIGEST) if self.undo else ()
        kept = [key for key in self.layout.keys if key.name not in dropped]
        own = [] if self.undo else self._own()
        magic, version, n_tensors, _ = COUNTS.unpack(cut(old, 0, COUNTS.size))
        yield COUNTS.pack(magic, version, n_tensors, len(kept) + len(own))
        for key in kept:
            if key.name == "general.architecture":
                yield pack_key(key.name, gguf.GGUFValueType.STRING, pack_text(after))
            elif key.name.startswith(f"{before}."):
                yield pack_text(after + key.name[len(before) :]) + cut(old, key.kind, key.end)
            else:
                yield cut(old, key.begin, key.end)
        yield from own
        yield cut(old, *self.layout.entries)

    def _own(self) -> list[bytes]:
        """The keys that a relabelled file has more."""
        sections = struct.pack("<IQ4i", gguf.GGUFValueType.INT32, 4, *self.change.sections)
        return [
            pack_key(f"{self.change.target}.{_SECTIONS}", gguf.GGUFValueType.ARRAY, sections),
            pack_key(ORIGIN, gguf.GGUFValueType.STRING, pack_text(self.change.origin)),
            _digest_key(_NO_DIGEST),
        ]

    def _data(self, old: IO[bytes]) -> Iterator[tuple[str, bytes, bytes]]:
        """The data in pieces: the name of the tensor that ends here or "", what stands there, and what is to stand."""
        turn, head_dim, at = pairs if self.undo else halves, self.change.head_dim, self.layout.data
        for tensor in sorted(self.layout.tensors, key=lambda tensor: tensor.begin):
            for piece in _pieces(old, at, tensor.begin, _STEP):
                yield "", piece, piece  # padding
            at = tensor.begin + tensor.nbytes
            n_rows = head_rows(self.change, tensor.name, tensor.shape)
            row = tensor.nbytes // n_rows if n_rows else 1
            step = max(_STEP // (row * head_dim), 1) * row * head_dim if n_rows else _STEP
            for begin, piece in zip(range(tensor.begin, at, step), _pieces(old, tensor.begin, at, step), strict=True):
                turned = turn(piece, head_dim, len(piece) // row) if n_rows else piece
                yield tensor.name if begin + step >= at else "", piece, turned
        for piece in _pieces(old, at, self.layout.size, _STEP):
            yield "", piece, piece


def _digest_key(digest: str) -> bytes:
    return pack_key(DIGEST, gguf.GGUFValueType.STRING, pack_text(digest))


def _pieces(file: IO[bytes], begin: int, end: int, step: int) -> Iterator[bytes]:
    for at in range(begin, end, step):
        yield cut(file, at, min(at + step, end))
