"""From a Hugging Face checkpoint to the two GGUF files that llama.cpp runs.

One way: ``api`` -> ``language`` and ``mmproj`` (what goes into each file) -> ``spec``, ``checkpoint``, ``tokenizer``
(what the folder holds) -> ``writer`` and ``quantize`` (how a file is made).
Other families than LLaVA: ``families`` -> ``upstream``, which runs llama.cpp's own converter in its own process.
``quantize`` takes GGUF files. ``annotate`` changes the pruning defaults of an mmproj file that exists, ``requantize``
the type of its matrices; ``check`` looks at files. Torch is needed for torch files only, torch and transformers for
llama.cpp's converter.
"""

from __future__ import annotations

from qap_gguf.convert.annotate import annotate
from qap_gguf.convert.api import ConvertResult, convert
from qap_gguf.convert.check import CheckReport, FileReport, PairReport, check_files
from qap_gguf.convert.output.imatrix import channel_weights
from qap_gguf.convert.output.imatrix_sums import merge_imatrix
from qap_gguf.convert.output.quantize import QUANTIZE_TYPES
from qap_gguf.convert.quantize import quantize
from qap_gguf.convert.requantize import REQUANTIZE_TYPES, Requantized, requantize

__all__ = [
    "QUANTIZE_TYPES",
    "REQUANTIZE_TYPES",
    "CheckReport",
    "ConvertResult",
    "FileReport",
    "PairReport",
    "Requantized",
    "annotate",
    "channel_weights",
    "check_files",
    "convert",
    "merge_imatrix",
    "quantize",
    "requantize",
]
