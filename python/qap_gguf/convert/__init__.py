"""From a Hugging Face checkpoint to the two GGUF files that llama.cpp runs.

One way: ``api`` -> ``language`` and ``mmproj`` (what goes into each file) -> ``spec``, ``checkpoint``, ``tokenizer``
(what the folder holds) -> ``writer`` and ``quantize`` (how a file is made).
Other families than LLaVA: ``families`` -> ``upstream``, which runs llama.cpp's own converter in its own process.
``annotate`` changes the pruning defaults of an mmproj file that exists, ``check`` looks at files. Torch is needed for
torch files only, torch and transformers for llama.cpp's converter.
"""

from __future__ import annotations

from qap_gguf.convert.annotate import annotate
from qap_gguf.convert.api import ConvertResult, convert
from qap_gguf.convert.check import CheckReport, FileReport, PairReport, check_files
from qap_gguf.convert.output.quantize import QUANTIZE_TYPES

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
