"""Measure what pruning saves: times of each step, time to the first token, KV cells, memory, against the bound.

One way: ``measure`` runs passes over a VisionModel -> ``report`` makes medians, ratios and tables of them. ``shapes``
and ``random_files`` make models of true sizes with random weights, for machines that hold no model.
"""

from __future__ import annotations

from qap_gguf.bench.measure import Pass, Plan, run_passes
from qap_gguf.bench.memory import peak_bytes
from qap_gguf.bench.random_files import RandomModel, cache_folder, make_random_model
from qap_gguf.bench.report import BenchReport, summarise
from qap_gguf.bench.shapes import SHAPES, Shape, find_shape

__all__ = [
    "SHAPES",
    "BenchReport",
    "Pass",
    "Plan",
    "RandomModel",
    "Shape",
    "cache_folder",
    "find_shape",
    "make_random_model",
    "peak_bytes",
    "run_passes",
    "summarise",
]
