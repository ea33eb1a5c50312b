"""Many pictures: a folder, a table, any iterable of rows, answered side by side by llama-server (docs/batch.md).

One way: ``inputs`` reads -> ``rows`` says what a row asks -> ``pipeline`` prepares and asks, through ``engine``, which
keeps llama-server alive -> ``results``; ``output`` remembers. ``slots`` counts how many answers fit the memory.
"""

from __future__ import annotations

from qap_gguf.batch.api import BatchModel, batch
from qap_gguf.batch.results import BatchResult

__all__ = ["BatchModel", "BatchResult", "batch"]
