"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end of the block, or is removed if the block raises."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp's is for its owner alone
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.replace(out, old / out.name)
            os.replace(made, out)
            shutil.rmtree(old)
        else:
            os.replace(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
