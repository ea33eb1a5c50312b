"""Files that grow by whole records, so that a run can go on where it was stopped, however it was stopped.

A record is appended with one write. What a crash or a loss of power cuts off is the end of the last record: it is taken
away when the file is opened again. A record is a line of JSON, or one of CSV, in which line breaks may stand between
quotation marks. One process at a time writes to a file (``flock``, where the system has it).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from qap_gguf.errors import DataError
from qap_gguf.files.atomic import sync
from qap_gguf.files.regular import open_regular

try:
    import fcntl
except ImportError:  # no POSIX system: nothing is locked
    fcntl = None  # type: ignore[assignment]

_SLICE: Final = 1 << 20


def fingerprint(path: Path) -> str:
    """What tells one file from another: its size and a hash of its first, middle and last megabyte.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            for at in (0, size // 2, max(0, size - _SLICE)):
                file.seek(at)
                digest.update(file.read(_SLICE))
    except OSError as err:
        raise DataError(f"expected a readable file, cannot open {path} ({err.strerror}); check the path") from err
    return f"{size}-{digest.hexdigest()[:16]}"


def whole_records(file: BinaryIO, *, quoted: bool = False) -> Iterator[bytes]:
    """The whole records of a file, each with its line break; what stands after the last one is not given.

    Args:
        file: at its beginning.
        quoted: a line break between quotation marks belongs to its record, as in CSV.

    Example:
        >>> import io
        >>> list(whole_records(io.BytesIO(b'a,"b\\nc"\\nd,"e\\n'), quoted=True))
        [b'a,"b\\nc"\\n']
    """
    record, is_open = b"", False
    for line in file:
        record += line
        is_open ^= quoted and line.count(b'"') % 2 == 1
        if line.endswith(b"\n") and not is_open:
            yield record
            record = b""


class RecordFile:
    """A file that grows by whole records; what it held is read once, when it is opened.

    Args:
        path: the file; made where it is missing, its folder too.
        read: called with each whole record and its number, from 1; False takes this record and all after it away,
            which only the last one may be: an error is raised otherwise.
        quoted: see :func:`whole_records`.
        durable: each record is on the disk when :meth:`append` returns, not only with the system.

    Raises:
        DataError: it cannot be read or written, another process writes to it, or `read` does not take a record that
            others follow.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a.jsonl"
        ...     n = path.write_text('{"id": 1}\\n{"id"')
        ...     with RecordFile(path, lambda record, number: True) as file:
        ...         file.append(b'{"id": 2}\\n')
        ...     path.read_text()
        '{"id": 1}\\n{"id": 2}\\n'
    """

    def __init__(
        self, path: Path, read: Callable[[bytes, int], bool], *, quoted: bool = False, durable: bool = False
    ) -> None:
        self.path, self._durable = path, durable
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            if not is_new:
                open_regular(path).close()  # a pipe or device is not waited for
            # no buffer: what could not be written on a full disk must not be tried again by close()
            self._file = path.open("ab", buffering=0)
        except OSError as err:
            raise self._unfit(err) from err
        try:
            self._lock()
            size = self._whole(read, quoted)
            if path.stat().st_size > size:
                self._file.truncate(size)
            if durable:
                os.fsync(self._file.fileno())
                if is_new:
                    sync(path.parent)
        except OSError as err:
            self._file.close()
            raise self._unfit(err) from err
        except BaseException:
            self._file.close()
            raise

    def _unfit(self, err: OSError) -> DataError:
        return DataError(
            f"{self.path}: expected a file to read and write, got {err.strerror or err}; choose another place"
        )

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise DataError(
                f"{self.path}: another process writes to it; wait until it has ended, or choose another file"
            ) from err
        except OSError:  # the file system knows no locks
            pass

    def _whole(self, read: Callable[[bytes, int], bool], quoted: bool) -> int:
        """Bytes of the records that are kept."""
        size, refused = 0, 0
        with self.path.open("rb") as file:
            for number, record in enumerate(whole_records(file, quoted=quoted), start=1):
                if refused:
                    raise DataError(f"{self.path}, line {refused}: expected a record of this run; take it out")
                if read(record, number):
                    size += len(record)
                else:
                    refused = number
        return size

    def append(self, record: bytes) -> None:
        """Write a record, which ends with a line break; it is in the file when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            while record:  # a disk that fills up takes a part first
                record = record[self._file.write(record) :]
            if self._durable:
                os.fsync(self._file.fileno())
        except OSError as err:
            raise DataError(f"{self.path}: cannot write ({err.strerror}); free some space and run again") from err

    def clear(self) -> None:
        """Take all records away."""
        self._file.truncate(0)

    def close(self) -> None:
        """Close the file, and give its lock back."""
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
