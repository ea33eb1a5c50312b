"""Pictures come to the encoder's size as the models were trained: stretched, not letterboxed (docs/upstream.md).

The truth is Pillow, which transformers' processors resize with: a picture that is resized here must give what the
picture that Pillow resized gives, which needs no resize.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import qap_gguf as qap
from conftest import Converted
from qap_gguf.convert import ConvertResult

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
# family -> (width, height) of a picture, what it is trained to become, the filter
CASES: dict[str, tuple[tuple[int, int], tuple[int, int], Image.Resampling]] = {
    "qwen2-vl": ((100, 70), (96, 64), BICUBIC),
    "qwen2.5-vl": ((150, 130), (140, 140), BICUBIC),
    "qwen3-vl": ((100, 70), (96, 64), BICUBIC),
    "glm-4.1v": ((100, 70), (96, 64), BICUBIC),
    "paddleocr-vl": ((100, 70), (96, 64), BICUBIC),
    "exaone-4.5": ((150, 130), (140, 140), BICUBIC),
    "gemma-3": ((100, 70), (64, 64), BILINEAR),
    "gemma-4": ((250, 180), (240, 192), BICUBIC),
    "minicpm-v-4.6": ((150, 100), (160, 96), BICUBIC),
    "pixtral": ((91, 66), (96, 72), BICUBIC),
    "mistral-3": ((91, 66), (96, 80), BICUBIC),
    "lighton-ocr": ((91, 66), (96, 80), BICUBIC),
}

LIMITS = {"minicpm-v-4.6": 1e-4}  # 2.5e-5 was measured; what is letterboxed, or sliced, is above 1e-3


def smooth(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Noise without the finest detail, so that a pixel more or less shows as what it is."""
    noise = np.random.default_rng(9).integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), BICUBIC))


@pytest.fixture(scope="module", params=list(CASES))
def files(request: pytest.FixtureRequest, converted: Converted) -> Iterator[tuple[str, Any]]:
    _, _, made = converted(request.param)
    llama = llama_cpp.Llama(str(made.model), n_ctx=64, verbose=False, n_threads=1)
    yield request.param, (made, llama)
    llama.close()


def features(files: tuple[ConvertResult, Any], pixels: npt.NDArray[np.uint8], resize: str | None = None) -> Any:
    made, llama = files
    with qap.VisionModel(made.mmproj, llama, flash_attn=False, resize=resize) as vlm:
        return vlm.encode(pixels).features


def nmse(got: Any, want: Any) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum()) if got.shape == want.shape else np.inf


def test_a_picture_becomes_what_pillow_makes_of_it(files: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name, pair = files
    size, trained, method = CASES[name]
    pixels = smooth(*size)
    want = features(pair, np.asarray(Image.fromarray(pixels).resize(trained, method)))
    limit = LIMITS.get(name, 1e-5)
    assert nmse(features(pair, pixels), want) <= limit
    assert nmse(features(pair, pixels, "stretch"), want) <= limit
    assert nmse(features(pair, pixels, "pad"), want) > 1e-3
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    assert nmse(features(pair, pixels), want) > 1e-3


def test_a_default_is_for_whoever_loads_an_mmproj(files: tuple[str, Any]) -> None:
    name, pair = files
    pixels = smooth(*CASES[name][0])
    padded = features(pair, pixels, "pad")
    qap.set_resize("pad")
    try:
        np.testing.assert_array_equal(features(pair, pixels), padded)
        assert nmse(features(pair, pixels, "auto"), padded) > 1e-3
    finally:
        qap.set_resize("auto")


def test_an_unknown_word_is_an_error() -> None:
    with pytest.raises(qap.ConfigError, match="resize: expected one of auto, stretch, pad, got 'crop'"):
        qap.VisionModel(resize="crop")
    with pytest.raises(qap.ConfigError, match="resize: expected"):
        qap.set_resize("")
