"""qap_gguf: faster local vision-language models in GGUF, by keeping only the image tokens that matter.

It chooses the tokens quantization-aware (QAPruner, arXiv 2604.02816) and drops the others before the language model
sees them. Import it before llama-cpp-python's multimodal chat handlers: it puts its own libmtmd in their place.

    >>> import qap_gguf as qap
    >>> with qap.VisionModel() as vlm:                       # the small model that comes with the package
    ...     image = vlm.encode(qap.packaged_model().sample)
    ...     answer = vlm.generate([image, "What is in row 1, column 2?"], prune=qap.PruneConfig(keep_ratio=0.5))
    >>> answer
    'house'
"""

import sys as _sys

from qap_gguf.errors import PinError as _PinError
from qap_gguf.runtime import load as _load

try:
    _load.load()
except _PinError as _err:
    if not _load.is_command():
        raise
    _sys.exit(f"qap-gguf: error: {_err}")  # at a prompt: one line, not a traceback

from qap_gguf import reference
from qap_gguf.batch import BatchResult, batch
from qap_gguf.chat import ChatHandler, SourceRules
from qap_gguf.config import PruneConfig
from qap_gguf.convert import CheckReport, ConvertResult, Requantized, annotate, check_files, convert, requantize
from qap_gguf.defaults import get_default, set_default, set_image_cache, use
from qap_gguf.errors import (
    ArrayError,
    ConfigError,
    ConvertError,
    DataError,
    ImageError,
    ModelFileError,
    NativeError,
    PinError,
    QapError,
    UnsupportedError,
)
from qap_gguf.files.packaged import PackagedModel, packaged_model
from qap_gguf.generation.settings import Generation, GenerationStats
from qap_gguf.model import VisionModel
from qap_gguf.plotting.plot import plot
from qap_gguf.pruning.prune import PrunedImage
from qap_gguf.pruning.score import Scores, score, select
from qap_gguf.runtime.devices import set_device
from qap_gguf.runtime.system import info
from qap_gguf.vision.cache import CacheStats, EmbeddingCache
from qap_gguf.vision.embedding import ImageEmbedding
from qap_gguf.vision.resize import set_resize

__version__ = "0.1.0"

__all__ = [
    "ArrayError",
    "BatchResult",
    "CacheStats",
    "ChatHandler",
    "CheckReport",
    "ConfigError",
    "ConvertError",
    "ConvertResult",
    "DataError",
    "EmbeddingCache",
    "Generation",
    "GenerationStats",
    "ImageEmbedding",
    "ImageError",
    "ModelFileError",
    "NativeError",
    "PackagedModel",
    "PinError",
    "PruneConfig",
    "PrunedImage",
    "QapError",
    "Requantized",
    "Scores",
    "SourceRules",
    "UnsupportedError",
    "VisionModel",
    "annotate",
    "batch",
    "check_files",
    "convert",
    "get_default",
    "info",
    "packaged_model",
    "plot",
    "reference",
    "requantize",
    "score",
    "select",
    "set_default",
    "set_device",
    "set_image_cache",
    "set_resize",
    "use",
]


def __dir__() -> list[str]:
    """The public names. Submodules such as ``qap_gguf.eval`` are imported by their own path."""
    return sorted([*__all__, "__version__"])
