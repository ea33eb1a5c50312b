"""Importance matrices as sums: weighted, merged, and written in llama-imatrix's file format.

Facts: tools/imatrix/imatrix.cpp (the keys and tensors of a file, how files are merged), common/imatrix-loader.cpp
(counts are rounded when they are read).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from qap_gguf.convert.output.disk_space import writing
from qap_gguf.convert.output.imatrix import read_imatrix
from qap_gguf.convert.output.writer import OutputFolder
from qap_gguf.errors import ConvertError
from qap_gguf.files.gguf import read_gguf

__all__ = ["ImatrixSums", "merge_imatrix", "read_sums", "weighted", "write_sums"]

Array = npt.NDArray[Any]
_MERGED_CURE = "merge files of one model"


@dataclass(frozen=True)
class ImatrixSums:
    """What an imatrix file holds.

    Attributes:
        entries: name of a tensor to sums of squares, float32 (matrices, columns), and the rows that were summed for
            each matrix, float32 (matrices, 1).
        datasets: what was read.
        chunk_size: rows of a chunk, at least 1; the number of chunks follows from it.
    """

    entries: Mapping[str, tuple[Array, Array]]
    datasets: tuple[str, ...]
    chunk_size: int

    @property
    def n_chunks(self) -> int:
        """As llama-imatrix counts them: the most rows of a matrix in chunks, begun ones left out."""
        return int(max((counts.max(initial=0) for _, counts in self.entries.values()), default=0)) // self.chunk_size


def weighted(sums: Array, counts: Array, weights: Sequence[float]) -> tuple[Array, Array]:
    """Sums and counts of several kinds of rows as one, each row counting as much as its kind's weight.

    Args:
        sums: float32 (kinds, columns times matrices).
        counts: int64 (kinds, matrices).
        weights: one for each kind, from 0 up.

    Returns:
        float32 (matrices, columns) and whole counts, float32 (matrices, 1): sums divided by counts are weighted means.

    Example:
        >>> sums, counts = np.array([[8.0, 4.0], [1.0, 1.0]], np.float32), np.array([[4], [1]])
        >>> [array.ravel().tolist() for array in weighted(sums, counts, (0.25, 1.0))]
        [[3.0, 2.0], [2.0]]
    """
    if all(weight == 1 for weight in weights):  # in float32, as llama-imatrix adds them
        total, rows = sums.sum(axis=0, dtype=np.float32), counts.sum(axis=0).astype(np.float64)
        return total.reshape(len(rows), -1), rows.astype(np.float32)[:, None]
    by = np.asarray(weights, np.float64)[:, None]
    exact, wide = (counts * by).sum(axis=0), (sums * by).sum(axis=0)
    whole = np.where(exact > 0, np.maximum(np.round(exact), 1), 0)
    scale = np.divide(whole, exact, out=np.zeros_like(exact), where=exact > 0)
    return (wide.reshape(len(whole), -1) * scale[:, None]).astype(np.float32), whole.astype(np.float32)[:, None]


def write_sums(path: Path, sums: ImatrixSums, *, force: bool = False) -> None:
    """Writes an imatrix file, whole or not at all.

    Raises ConvertError where there is one already (without `force`), or no room.
    """
    with OutputFolder(path.parent, force) as folder:
        folder.check(path)
        temporary = folder.temp(path)
        tensors: dict[str, Array] = {}
        for name in sorted(sums.entries):
            values, counts = sums.entries[name]
            tensors |= {f"{name}.in_sum2": values, f"{name}.counts": counts}
        keys: dict[str, str | int | list[str]] = {
            "general.type": "imatrix", "imatrix.datasets": list(sums.datasets) or [""],
            "imatrix.chunk_count": sums.n_chunks, "imatrix.chunk_size": sums.chunk_size,
        }  # fmt: skip
        write_plain(temporary, keys, tensors)
        folder.commit((temporary, path))


def write_plain(path: Path, keys: Mapping[str, str | int | list[str]], tensors: Mapping[str, Array]) -> None:
    """Writes a GGUF file with these keys (texts, lists of texts, 32-bit numbers) and tensors, and nothing else."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].pop("general.architecture")  # llama-imatrix writes none
    with contextlib.ExitStack() as stack, writing(path.parent):
        stack.callback(writer.close)
        for key, value in keys.items():
            if isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, array in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_sums(path: str | Path) -> ImatrixSums:
    """Reads an imatrix file in GGUF, ours or llama-imatrix's.

    Raises ConvertError where it is missing, damaged, in the older format, or another kind of file.
    """
    path = Path(path)
    known = read_imatrix(path)  # all checks
    try:
        with path.open("rb") as file:
            new = file.read(4) == b"GGUF"
    except OSError as err:
        raise ConvertError(f"expected an imatrix file, cannot open {path} ({err.strerror}); check the path") from err
    if not new:
        raise ConvertError(f"expected an imatrix in GGUF, got the older format at {path}; measure it anew")
    reader = gguf.GGUFReader(path)
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    entries = {}
    for name in known.entries:
        counts = arrays[f"{name}.counts"].reshape(-1, 1)
        entries[name] = arrays[f"{name}.in_sum2"].reshape(len(counts), -1), np.round(counts)
    size = read_gguf(path).metadata["imatrix.chunk_size"]
    datasets = reader.fields["imatrix.datasets"].contents()
    names = tuple(map(str, datasets)) if isinstance(datasets, list) else ()
    return ImatrixSums(entries, names, max(int(size), 1) if isinstance(size, int) else 1)


def merge_imatrix(paths: Sequence[str | Path], out: str | Path, *, force: bool = False) -> ImatrixSums:
    """Adds the sums and counts of imatrix files of one model, as llama-imatrix --in-file does, and writes the result.

    paths: at least two files in GGUF. out: the file to write. force: replace it if it is there.

    Raises ConvertError where a file is none, or they belong to models of other widths.

    Example:
        >>> try:
        ...     merge_imatrix(["a.gguf"], "out.gguf")
        ... except ConvertError as err:
        ...     print(err)
        expected at least two files to merge, got 1; name all of them
    """
    if len(paths) < 2:
        raise ConvertError(f"expected at least two files to merge, got {len(paths)}; name all of them")
    parts = [read_sums(path) for path in paths]
    entries: dict[str, tuple[Array, Array]] = {}
    for path, part in zip(paths, parts, strict=True):
        for name, (sums, counts) in part.entries.items():
            if name not in entries:
                entries[name] = sums, counts
                continue
            before, rows = entries[name]
            if before.size != sums.size or (len(rows) != len(counts) and 1 not in (len(rows), len(counts))):
                raise ConvertError(
                    f"expected {before.size} sums and {len(rows)} counts for {name}, got {sums.size} and {len(counts)} "
                    f"in {path}; {_MERGED_CURE}"
                )
            n_counts = max(len(rows), len(counts))
            entries[name] = (before.reshape(n_counts, -1) + sums.reshape(n_counts, -1), rows + counts)
    datasets = tuple(name for part in parts for name in part.datasets)
    merged = ImatrixSums(entries, datasets, parts[0].chunk_size)
    write_sums(Path(out), merged, force=force)
    return merged
