"""What is HunyuanVL's own: rows that stand for no place, the filter of its resize, what libllama does with its text.

The truth is transformers with two methods of the authors' code (truth.as_authors). When the last test fails, upstream
has fixed it: docs/upstream.md says so then, and truth.absolute().
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
from positions.language_files import logits, nmse

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from families import truth  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

Array = npt.NDArray[Any]
IDS = [1, 300, 45, 301, 302, 46, 303, 47, 304]


@pytest.fixture(scope="module")
def pair(converted: Converted) -> Iterator[tuple[Any, Any, Any]]:
    """transformers' model, the files, and libllama's model."""
    hf, _, files = converted("hunyuan-vl")
    llama = llama_cpp.Llama(str(files.model), n_ctx=64, verbose=False, n_threads=1)
    yield hf, files, llama
    llama.close()


def encoder(pair: tuple[Any, Any, Any], **more: Any) -> qap.VisionModel:
    return qap.VisionModel(pair[1].mmproj, pair[2], flash_attn=False, n_threads=1, **more)


def test_the_rows_that_stand_for_no_place_are_transformers_too(pair: tuple[Any, Any, Any]) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    normal = torch.tensor(((pixels.astype("f4") / 255 - 0.5) / 0.5).transpose(2, 0, 1).copy())
    with torch.no_grad():
        want = pair[0].model.get_image_features(**truth.inputs("hunyuan-vl", pair[0], normal)).pooler_output[0].numpy()
    with encoder(pair) as vlm:
        image = vlm.encode(pixels)
    (piece,) = image.pieces
    assert piece.special == (0, 7, 14, 21, 28, 29)  # four lines of six tokens
    assert (piece.n_tokens, piece.n_columns) == (24, 6)
    assert max(nmse(a, b) for a, b in zip(image.features, want, strict=True)) <= 1e-5


def test_pictures_are_resized_with_the_filter_of_the_authors_code(
    pair: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(9).integers(0, 256, (14, 20, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((100, 70), Image.Resampling.BICUBIC)
    found = []
    for stock in ("", "1"):
        monkeypatch.setenv("QAP_STOCK_ENCODER", stock)
        with encoder(pair) as vlm:
            found.append(vlm.encode(np.asarray(picture)).features)
    monkeypatch.undo()
    with encoder(pair) as vlm:
        wanted = [
            vlm.encode(np.asarray(picture.resize((96, 64), method))).features
            for method in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
        ]
    print(f"\nhunyuan-vl: resized otherwise, stock's NMSE is {nmse(found[1], wanted[0]):.1e}")
    # random weights tell pictures apart by little: each is nearer to its own filter's picture
    assert 5 * nmse(found[0], wanted[0]) < nmse(found[0], wanted[1])
    assert 5 * nmse(found[1], wanted[1]) < nmse(found[1], wanted[0])


def text_logits(hf: Any, fourth_axis_is_0: bool) -> Array:
    positions = np.repeat(np.arange(len(IDS))[None, None], 4, axis=0)
    if fourth_axis_is_0:
        positions[3] = 0
    with torch.no_grad():
        embeds = hf.get_input_embeddings()(torch.tensor([IDS]))
        hidden = hf.model.language_model(inputs_embeds=embeds, position_ids=torch.tensor(positions)).last_hidden_state
        return np.asarray(hf.lm_head(hidden)[0, -1].numpy())


def test_libllama_leaves_the_fourth_axis_of_text_at_0(pair: tuple[Any, Any, Any]) -> None:
    """Training counted the tokens of text on all four axes; so a prompt without a picture differs, too."""
    hf, files, _ = pair
    got = logits(files.model, IDS)[-1]
    error, as_found = nmse(got, text_logits(hf, False)), nmse(got, text_logits(hf, True))
    print(f"\nhunyuan-vl: logits of a text, NMSE {error:.1e}; with the fourth axis at 0, {as_found:.1e}")
    assert 3 * as_found < error  # both are small: random weights attend to all places nearly alike
