"""Chat completions as llama-cpp-python gives them, with pruning: :class:`ChatHandler` for ``llama_cpp.Llama``."""

from typing import TYPE_CHECKING, Any

from qap_gguf.vision.sources import SourceRules

if TYPE_CHECKING:
    from qap_gguf.chat.handler import ChatHandler

__all__ = ["ChatHandler", "SourceRules"]


def __getattr__(name: str) -> Any:
    """The handler, loaded when it is asked for: it needs VisionModel, which needs this package's `sources`."""
    if name != "ChatHandler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qap_gguf.chat.handler import ChatHandler

    return ChatHandler
