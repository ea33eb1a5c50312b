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

from qap_gguf import _load

try:
    _load.load()
except _load.PinError as _err:
    if not _load.is_command():
        raise
    _sys.exit(f"qap-gguf: error: {_err}")  # at a prompt: one line, not a traceback

from qap_gguf import reference  # noqa: E402
from qap_gguf.config import PruneConfig  # noqa: E402
from qap_gguf.convert import ConvertResult, convert  # noqa: E402
from qap_gguf.defaults import get_default, set_default, use  # noqa: E402
from qap_gguf.embedding import ImageEmbedding, PrunedImage  # noqa: E402
from qap_gguf.errors import (  # noqa: E402
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
from qap_gguf.generation import Generation, GenerationStats  # noqa: E402
from qap_gguf.model import VisionModel  # noqa: E402
from qap_gguf.packaged import PackagedModel, packaged_model  # noqa: E402
from qap_gguf.score import Scores, score, select  # noqa: E402
from qap_gguf.system import info  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "ArrayError",
    "ConfigError",
    "ConvertError",
    "ConvertResult",
    "DataError",
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
    "Scores",
    "UnsupportedError",
    "VisionModel",
    "convert",
    "get_default",
    "info",
    "packaged_model",
    "reference",
    "score",
    "select",
    "set_default",
    "use",
]
