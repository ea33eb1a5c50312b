"""What `batch` reads: folders, patterns, lists of paths, and tables in JSON lines, CSV or Parquet.

Tables are read row by row, so that they may be larger than the memory. A line that cannot be read is a row with an
error.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qap_gguf.batch.rows import KEYS, Defaults, Given, from_text, is_openai, read_row
from qap_gguf.batch.video import frame_rows, novelties
from qap_gguf.errors import ConfigError, DataError, UnsupportedError
from qap_gguf.files.regular import open_regular
from qap_gguf.vision import video

#: Names of pictures in a folder; each kind is one that SourceRules reads.
SUFFIXES: Final = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
TABLES: Final = (".jsonl", ".ndjson", ".csv", ".parquet")
LISTS: Final = (".txt", ".list", ".lst")
_MAGIC: Final = frozenset("*?[")


@dataclass(frozen=True)
class Input:
    """Rows to read.

    Attributes:
        read: reads them, from the first one each time it is called.
        total: how many there are.
        is_openai: they have the form of OpenAI's batch files.
        unused: columns of a table that mean nothing here.
    """

    read: Callable[[], Iterator[Given]] = field(repr=False)
    total: int
    is_openai: bool = False
    unused: tuple[str, ...] = ()


def find_input(words: Sequence[str | os.PathLike[str]], every: float | None = None) -> Input:
    """What some words stand for: one table, or any number of folders, patterns, lists and pictures.

    Args:
        words: names; a folder is searched with the folders in it, in the order of names.
        every: seconds between the frames of videos; None where there are none.

    Raises:
        ConfigError: a video without `every`, or `every` cannot be.
        DataError: nothing is there, a name cannot be read, or a table stands beside something else.
        ImageError: a video that ffmpeg does not read.
        UnsupportedError: Parquet without pyarrow, a video without ffmpeg.

    Example:
        >>> import qap_gguf as qap
        >>> found = find_input([qap.packaged_model().sample])
        >>> found.total, [row.values["image"].name for row in found.read()]
        (1, ['sample.png'])
    """
    tables = [word for word in words if Path(word).suffix.lower() in TABLES and not Path(word).is_dir()]
    if tables:
        if len(words) > 1:
            raise DataError(f"{tables[0]}: expected a table alone, got {len(words)} inputs; run batch for each")
        return _table(Path(tables[0]))
    every = None if every is None else video.check_every(every)
    rows: list[Given] = []
    for word in words:
        rows += _pictures(word, every is not None)
    if not rows:
        raise DataError(f"{', '.join(map(str, words))[:200]}: expected pictures, found none; check the place")
    return _with_videos(rows, every)


def _with_videos(rows: list[Given], every: float | None) -> Input:
    """Rows of which some are videos: those become their frames, read anew each time."""
    found: list[tuple[Given, list[float]]] = []
    for row in rows:
        is_video = Path(row.values["image"]).suffix.lower() in video.SUFFIXES
        if is_video and every is None:
            raise ConfigError(f"{row.values['id']}: expected --every with a video; --every 1 takes a frame a second")
        found.append((row, novelties(_place(row), every) if is_video and every is not None else []))

    def read() -> Iterator[Given]:
        for row, new in found:
            if new and every is not None:
                yield from frame_rows(_place(row), str(row.values["id"]), every, new)
            else:
                yield row

    return Input(read, sum(len(new) or 1 for _, new in found))


def _place(row: Given) -> Path:
    return Path(row.folder or "", row.values["image"])


def n_unknown(found: Input, known: Container[str]) -> int:
    """Rows whose id is not among those that are known."""
    return sum(read_row(row, number, Defaults()).id not in known for number, row in enumerate(found.read(), start=1))


def _pictures(word: str | os.PathLike[str], videos: bool) -> Iterator[Given]:
    path, text = Path(word), os.fspath(word)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name that no file can have
        is_folder = is_there = False
    if is_folder:
        for found in _walk(path, SUFFIXES + (video.SUFFIXES if videos else ())):
            yield Given({"image": found, "id": found.relative_to(path).as_posix()})
    elif is_there and path.suffix.lower() in LISTS:
        for line in _lines(path):
            if line.strip():
                yield Given({"image": line.strip(), "id": line.strip()}, path.parent)
    elif is_there:
        yield Given({"image": path, "id": text})
    elif _MAGIC & set(text):
        matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 (an absolute pattern too)
        for name in (name for name in matches if Path(name).is_file()):
            yield Given({"image": Path(name), "id": name})
    else:
        raise DataError(f"{text[:200]}: expected a folder, a pattern, a picture, a list or a table, found none there")


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent) / name for name in sorted(names) if Path(name).suffix.lower() in suffixes)


def _lines(path: Path) -> Iterator[str]:
    try:
        with open_regular(path) as file:
            for line in file:
                yield line.decode("utf-8-sig" if line[:3] == b"\xef\xbb\xbf" else "utf-8", "surrogateescape")
    except OSError as err:
        raise _unreadable(path, err) from err


def _unreadable(path: Path, err: Exception) -> DataError:
    why = getattr(err, "strerror", None) or " ".join(str(err).split())
    return DataError(f"{path}: expected a file to read, got {why}; check it")


def _table(path: Path) -> Input:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    return _csv(path) if suffix == ".csv" else _json_lines(path)


def _unused(names: Sequence[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(name) for name in names if name not in KEYS))


def _used(values: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in values.items() if name in KEYS}


def _json_lines(path: Path) -> Input:
    def rows() -> Iterator[Given]:
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                why = f"line {number}: expected a JSON object, got {line.strip()[:40]!r}; correct it"
                yield Given({}, error=why, is_openai=openai)
            else:
                yield Given(values if openai else _used(values), path.parent, is_openai=openai)

    total, openai = 0, False
    unused: tuple[str, ...] = ()
    for line in _lines(path):
        total += bool(line.strip())
        if total == 1 and not openai and line.strip():
            try:
                first = json.loads(line)
            except (ValueError, RecursionError):
                first = {}
            openai = isinstance(first, dict) and is_openai(first)
            unused = () if openai or not isinstance(first, dict) else _unused(list(first))
    _check_total(path, total)
    return Input(rows, total, openai, unused)


def _check_total(path: Path, total: int) -> None:
    if not total:
        raise DataError(f"{path}: expected rows, found none; check the file")


def _csv(path: Path) -> Input:
    def records() -> Iterator[list[str]]:
        try:
            with open_regular(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
                yield from (cells for cells in csv.reader(file, strict=True) if cells)
        except (OSError, UnicodeDecodeError, csv.Error) as err:
            raise _unreadable(path, err) from err

    def rows() -> Iterator[Given]:
        found = records()
        names = next(found)
        for number, cells in enumerate(found, start=2):
            if len(cells) != len(names):
                why = f"record {number}: expected {len(names)} cells, got {len(cells)}; correct it"
                yield Given({}, error=why)
                continue
            values = {name: from_text(name, cell) for name, cell in zip(names, cells, strict=True) if cell}
            yield Given(_used(values), path.parent)

    found = records()
    names = next(found, [])
    total = sum(1 for _ in found)
    if "image" not in names:
        raise DataError(f"{path}: expected a first line with the column image, got {','.join(names)[:80]!r}; add it")
    _check_total(path, total)
    return Input(rows, total, unused=_unused(names))


def _parquet(path: Path) -> Input:
    try:
        import pyarrow.parquet
    except ImportError as err:
        raise UnsupportedError("batch: expected pyarrow for Parquet, found none; run pip install pyarrow") from err

    def opened() -> Any:
        try:
            return pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as err:
            raise _unreadable(path, err) from err

    def rows() -> Iterator[Given]:
        with opened() as file:
            names = [name for name in file.schema_arrow.names if name in KEYS]
            try:
                for batch in file.iter_batches(batch_size=64, columns=names):
                    yield from (Given(values, path.parent) for values in batch.to_pylist())
            except (OSError, pyarrow.ArrowException) as err:
                raise _unreadable(path, err) from err

    with opened() as file:
        names, total = list(file.schema_arrow.names), file.metadata.num_rows
    if "image" not in names:
        raise DataError(f"{path}: expected a column image, got {', '.join(names)[:80]}; rename yours")
    _check_total(path, total)
    return Input(rows, total, unused=_unused(names))
