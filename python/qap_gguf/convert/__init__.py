"""From a Hugging Face LLaVA-1.5-style checkpoint to the two GGUF files that llama.cpp runs.

One way: ``api`` -> ``language`` and ``mmproj`` (what goes into each file) -> ``spec``, ``checkpoint``, ``tokenizer``
(what the folder holds) -> ``writer`` and ``quantize`` (how a file is made).
``annotate`` changes the pruning defaults of an mmproj file that exists, ``check`` looks at files. Nothing
here needs torch or transformers.
"""

from __future__ import annotations

from .annotate import annotate
from .api import ConvertResult, convert
from .check import CheckReport, FileReport, PairReport, check_files
from .quantize import QUANTIZE_TYPES

__all__ = [
    "QUANTIZE_TYPES",
    "CheckReport",
    "ConvertResult",
    "FileReport",
    "PairReport",
    "annotate",
    "check_files",
    "convert",
]
