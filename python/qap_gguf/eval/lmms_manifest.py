"""What lmms-eval loads by the entry point ``lmms_eval.models``: the name of our model class, and nothing heavy."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's registration of the model ``qap_gguf`` (:mod:`qap_gguf.eval.lmms`)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("qap_gguf", chat_class_path="qap_gguf.eval.lmms.QapGguf")
