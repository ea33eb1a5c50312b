"""Files that a stranger may have put there are opened only if they are regular ones.

A pipe waits for a writer without end, a device may give bytes for ever, and only opening some does something.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading its bytes; it never waits.

    Raises:
        OSError: there is none, it cannot be opened, or it is no regular file (a folder, pipe, socket or device, also
            behind a link).

    Example:
        >>> import os
        >>> open_regular(os.devnull)
        Traceback (most recent call last):
        OSError: [Errno 22] no regular file: '/dev/null'
    """
    _check(Path(path).stat(), path)  # before it is opened: opening a device may do something
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check(os.fstat(number), path)  # the name may mean another file by now
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: see :func:`open_regular`.
    """
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a regular file in UTF-8, its line ends as ``\\\\n``.

    Raises:
        OSError: see :func:`open_regular`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_regular(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _check(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(Path(path)))
