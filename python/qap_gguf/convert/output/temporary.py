"""What a killed process leaves behind: temporary files without an owner, and names whose data is not on the disk yet.

A process that writes to a folder holds a shared lock on it (``flock`` on the folder itself: no lock file, and the
system lets go when the process ends, however it ends). Whoever can have the lock alone, for a moment, knows that no
writer lives, and that temporary files there are nobody's.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system: nothing is locked, and so nothing is removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["name_once", "shared", "sync", "temporary_name"]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.qap-tmp")


def temporary_name(final: Path, tag: str) -> Path:
    """A hidden name beside `final`; `tag`: eight hexadecimal digits.

    Example:
        >>> temporary_name(Path("out/model.gguf"), "0011aabb").name
        '.model.gguf.0011aabb.qap-tmp'
    """
    return final.with_name(f".{final.name}.{tag}.qap-tmp")


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Hold the folder's lock as a writer. The first writer removes what killed ones have left.

    Where the file system knows no locks, nothing is locked and nothing removed.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # another writer lives, or no locks here
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in folder.iterdir():
                if _TEMPORARY.fullmatch(path.name) and path.is_file():
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a rename may otherwise be there before the data is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def name_once(temporary: Path, final: Path) -> None:
    """Give a file its final name if that is free; FileExistsError where another process took it meanwhile."""
    try:
        os.link(temporary, final)  # fails where the name is taken, in one step
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if final.exists():
            raise FileExistsError(f"{final} was made meanwhile") from None
        os.replace(temporary, final)
    else:
        temporary.unlink()
