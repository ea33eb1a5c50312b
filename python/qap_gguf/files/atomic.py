"""Files that are whole or absent: written under a hidden temporary name, then renamed.

A process that writes to a folder holds a shared lock on it (``flock`` on the folder itself: no lock file, and the
system releases it when the process ends, however it ends). A process that gets the lock exclusively, for a moment,
knows that there is no other writer, and that the temporary files there were left by killed ones. It removes them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system: nothing is locked, and so nothing is removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["name_once", "replacing", "shared", "sync", "temporary_name"]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.qap-tmp")


def temporary_name(final: Path) -> Path:
    """A new hidden name beside `final`.

    Example:
        >>> temporary_name(Path("out/model.gguf")).name  # doctest: +ELLIPSIS
        '.model.gguf....qap-tmp'
    """
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.qap-tmp")


@contextlib.contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A temporary path that becomes `final` at the end of the block, or is removed if the block raises.

    What `final` held before is replaced in one step, so a reader finds the old content or the new one, never a part.
    The data is not synced to the disk: after a loss of power the file may be the old one, or empty.

    Raises:
        OSError: the folder is not there, or cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a.txt") as path:
        ...         n = path.write_text("whole")
        ...     [(path.name, path.read_text()) for path in Path(folder).iterdir()]
        [('a.txt', 'whole')]
    """
    with shared(final.parent):
        temporary = temporary_name(final)
        try:
            yield temporary
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)


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
