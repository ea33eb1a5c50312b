"""Chat completions as llama-cpp-python gives them, with pruning: :class:`ChatHandler` for ``llama_cpp.Llama``."""

from qap_gguf.chat.handler import ChatHandler
from qap_gguf.chat.sources import SourceRules

__all__ = ["ChatHandler", "SourceRules"]
