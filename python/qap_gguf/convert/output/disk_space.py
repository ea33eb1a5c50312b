"""Room on the disk: asked for before a file is written, and said in one line where the system refuses meanwhile."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from qap_gguf.errors import ConvertError

__all__ = ["require_space", "writing"]


def require_space(folder: Path, n_bytes: int) -> None:
    """Raises ConvertError where the disk of `folder` has less than `n_bytes` left.

    Example:
        >>> require_space(Path(), 1)
        >>> try:
        ...     require_space(Path(), 1 << 60)
        ... except ConvertError as err:
        ...     print(err)
        expected 1152921.5 TB free in ., got ...; free some space or choose another OUT
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # a file system that does not say: the write itself will
        return
    if free < n_bytes:
        raise ConvertError(
            f"expected {_size(n_bytes)} free in {folder}, got {_size(free)}; free some space or choose another OUT"
        )


def _size(n_bytes: int) -> str:
    """A number of bytes for people: three digits at least.

    Example:
        >>> _size(999), _size(13_500_000_000)
        ('999 bytes', '13.5 GB')
    """
    amount, unit = float(n_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount >= 1000:
            amount, unit = amount / 1000, larger
    return f"{n_bytes} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the system's refusal to write (no space, no permission) into a ConvertError."""
    try:
        yield
    except OSError as err:
        # NumPy says of a full disk only how many values it wrote, without the system's words.
        reason = err.strerror or f"not all bytes could be written: {err}"
        raise ConvertError(
            f"expected to write to {folder}, got a refusal ({reason}); free some space or choose another OUT"
        ) from err
