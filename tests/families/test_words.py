"""What stands around a picture of LightOnOCR and Janus Pro: as transformers' processors write it (docs/upstream.md)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import qap_gguf as qap
from conftest import Converted
from qap_gguf import _core

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families.checkpoints import FAMILIES  # noqa: E402
from families.checkpoints_newer import JANUS_SPECIAL  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

STOCK = {"lighton-ocr": ("<|im_start|>", "<|im_end|>"), "janus-pro": ("", "")}


def trained(name: str) -> str:
    """The processor's text for a picture of the family's size, a token being @."""
    if name == "janus-pro":
        begin, end, _ = JANUS_SPECIAL
        own = SimpleNamespace(image_start_token=begin, image_end_token=end, image_token="@", num_image_tokens=64)
        return str(transformers.JanusProcessor.replace_image_token(own, {}, 0))
    width, height = FAMILIES[name].image
    own = SimpleNamespace(effective_patch_size=16, image_token="@")
    return str(transformers.LightOnOcrProcessor.replace_image_token(own, {"image_sizes": [(height, width)]}, 0))


@pytest.mark.parametrize("name", STOCK)
def test_the_words_are_those_of_the_processor(name: str, converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    files = converted(name)[2]

    def written() -> str:
        with qap.VisionModel(files.mmproj, files.model, n_ctx=64, flash_attn=False, n_threads=1) as vlm:
            chunks = vlm._encoder.tokenize(_core.media_marker(), [FAMILIES[name].image], add_special=False)
            text = vlm.language_model.detokenize
            return "".join(
                "@" * chunk.n_tokens if chunk.is_image else text(chunk.tokens, special=True).decode()
                for chunk in chunks
            )

    assert written() == trained(name)
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    before, after = STOCK[name]
    assert written() == before + "@" * trained(name).count("@") + after != trained(name)
