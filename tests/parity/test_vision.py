"""The encoder and the answers against transformers on the same weights, in f32, dense and pruned.

transformers is the truth. The stock libmtmd's figures (QAP_STOCK_ENCODER=1) are computed beside ours, so that the
limits are seen to mean something: its two defects are described in native/upstream/002-llava-encoder.patch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import qap_gguf as qap
from qap_gguf import _core

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

Array = npt.NDArray[Any]
LIMIT = 1e-5


def nmse(got: Array, want: Array) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


def row_cosines(got: Array, want: Array) -> Array:
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    return np.asarray((got * want).sum(axis=1) / norms)


@dataclass
class Case:
    """One checkpoint, converted to f32, with transformers' model and a picture that needs no resize."""

    vlm: qap.VisionModel
    hf: Any
    pixels: Array  # uint8 (size, size, 3)
    features: Array  # transformers', (n_tok, n_embd)

    def pixel_values(self, folder: Path) -> Any:
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        mean = np.array(processor["image_mean"], dtype="f4")
        std = np.array(processor["image_std"], dtype="f4")
        return torch.tensor((((self.pixels.astype("f4") / 255) - mean) / std).transpose(2, 0, 1)[None])


def image_features(hf: Any, pixel_values: Any) -> Array:
    """Projected features of one picture; transformers returned a list, a tensor and an output object over time."""
    with torch.no_grad():
        out = hf.get_image_features(pixel_values=pixel_values)
    out = getattr(out, "pooler_output", out)
    features: Array = out[0].numpy()
    return features


CASES: dict[str, dict[str, Any]] = {
    "tiny-llava": {},
    "random-224-layer-2": {"vision_feature_layer": -2},
    "random-224-layer-1": {"vision_feature_layer": -1},
}
TOWER = {
    "image_size": 224, "patch_size": 14, "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4,
    "intermediate_size": 256,
}  # fmt: skip


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    if request.param == "tiny-llava":
        folder: Path = request.getfixturevalue("tiny_llava")
    else:
        make: Callable[..., Path] = request.getfixturevalue("make_llava")
        folder = make(vision=TOWER, top=CASES[request.param], text={"max_position_embeddings": 1024})
    files = qap.convert(
        folder, tmp_path_factory.mktemp("gguf"), quantize="F32", keep_positions=False, mmproj_type="f32"
    )
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    size = hf.config.vision_config.image_size
    pixels = np.random.default_rng(5).integers(0, 256, (size, size, 3), dtype=np.uint8)
    if request.param == "tiny-llava":  # a picture that it knows: it was trained on pictures, not on noise
        pixels = np.array(Image.open(qap.packaged_model().sample).convert("RGB"))
    # f32 in the KV cache as well, so that nothing but the order of sums differs
    llama = llama_cpp.Llama(
        str(files.model), n_ctx=512, type_k=0, type_v=0, flash_attn=False, verbose=False, n_threads=2
    )
    with qap.VisionModel(files.mmproj, llama, flash_attn=False) as vlm:
        result = Case(vlm, hf, pixels, np.empty(0))
        result.features = image_features(hf, result.pixel_values(folder))
        yield result
    llama.close()


def test_features_equal_transformers_row_for_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    got = case.vlm.encode(case.pixels).features
    rows = [nmse(a, b) for a, b in zip(got, case.features, strict=True)]
    cosines = row_cosines(got, case.features)
    monkeypatch.setenv("QAP_STOCK_ENCODER", "1")
    stock = case.vlm._encoder.encode(case.pixels, hidden=False).features  # not from the cache
    print(
        f"encoder NMSE {nmse(got, case.features):.1e}, worst row {max(rows):.1e}, mean cosine {cosines.mean():.7f}; "
        f"stock NMSE {nmse(stock, case.features):.1e}, mean cosine {row_cosines(stock, case.features).mean():.4f}"
    )
    assert nmse(got, case.features) <= LIMIT
    assert max(rows) <= LIMIT
    assert cosines.mean() >= 0.9999
    assert nmse(stock, case.features) > 1000 * LIMIT


def test_attention_is_that_of_the_layer_whose_output_is_used(case: Case) -> None:
    tower = case.hf.model.vision_tower
    tower.set_attn_implementation("eager")
    folder = Path(case.hf.config._name_or_path)
    with torch.no_grad():
        layers = tower(case.pixel_values(folder), output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    # hidden_states[0] is the input of layer 0, so hidden_states[-2] is the output of layer n - 2
    weights = layers[len(layers) + case.hf.config.vision_feature_layer][0].mean(0).numpy()  # (queries, keys)
    image = case.vlm.encode(case.pixels)
    assert image.attention is not None
    assert image.received is not None
    print(
        f"attention NMSE {nmse(image.attention, weights[0, 1:]):.1e}, "
        f"received {nmse(image.received, weights.mean(0)[1:]):.1e}"
    )
    assert nmse(image.attention, weights[0, 1:]) <= LIMIT
    assert nmse(image.received, weights.mean(0)[1:]) <= LIMIT


def test_likeness_to_the_prompt_uses_the_language_models_own_embeddings(case: Case) -> None:
    prompt = "What is in row 2?"
    tokens = case.vlm.language_model.tokenize(prompt.encode(), add_bos=False, special=False)
    with torch.no_grad():
        mean = case.hf.get_input_embeddings()(torch.tensor(tokens)).mean(0).numpy()
    want = case.features @ mean / (np.linalg.norm(case.features, axis=1) * np.linalg.norm(mean))
    image = case.vlm.encode(case.pixels)
    got = case.vlm.signals(image, prompt).relevance("text")
    assert got is not None
    assert nmse(got, want) <= LIMIT
    scores = case.vlm.score(image, qap.PruneConfig(semantic="text", alpha=1.0), prompt)
    assert nmse(scores.semantic, (want - want.min()) / (want.max() - want.min())) <= 10 * LIMIT


def test_missing_signals_are_an_error_that_lists_the_others(case: Case) -> None:
    image = case.vlm.encode(case.pixels)
    assert case.vlm.signals(image).available() == ("cls", "attention")
    assert case.vlm.signals(image, "why").available() == ("cls", "text", "attention")
    with pytest.raises(qap.UnsupportedError, match=r"cannot give text .*pass one.*use one of cls, attention, none"):
        case.vlm.prune(image, qap.PruneConfig(semantic="text"))
    with pytest.raises(qap.UnsupportedError, match="cannot give clip_text; use one of cls, text, attention, none"):
        case.vlm.prune(image, qap.PruneConfig(semantic="clip_text"), prompt="why")


def hf_logits(case: Case, before: list[int], rows: Array, after: list[int]) -> Array:
    """Logits after the last token of: text, the given image rows, text; positions without gaps."""
    embed = case.hf.get_input_embeddings()
    parts = [embed(torch.tensor(before)), torch.tensor(rows), embed(torch.tensor(after))]
    with torch.no_grad():
        out: Array = case.hf(inputs_embeds=torch.cat(parts)[None]).logits[0, -1].numpy()
    return out


@pytest.mark.parametrize("part", [1, 2, 8], ids=["dense", "half", "eighth"])
def test_first_answer_token_equals_transformers(case: Case, part: int) -> None:
    image = case.vlm.encode(case.pixels)
    cfg = None if part == 1 else qap.PruneConfig(n_keep=image.n_tokens // part)
    kept = np.arange(image.n_tokens) if cfg is None else case.vlm.prune(image, cfg).indices
    # chat() prefills at once, and nothing is sampled before the first piece is asked for
    generation = case.vlm.generate([image, "What is this?"], prune=cfg, max_tokens=1, stream=True)
    got = case.vlm.last_logits()
    generation.close()

    chunks = prompt_chunks(case.vlm, "What is this?", image.size)
    assert [chunk.is_image for chunk in chunks] == [False, True, False]
    want = hf_logits(case, chunks[0].tokens, case.features[kept], chunks[2].tokens)
    n_vocab = min(len(got), len(want))
    spread = want - want.mean()  # a shift that softmax ignores must not hide an error
    error = float(((got[:n_vocab] - want[:n_vocab]) ** 2).sum() / (spread**2).sum())
    print(f"logits NMSE {error:.1e} with {len(kept)} of {image.n_tokens} tokens")
    assert error <= LIMIT


def prompt_chunks(vlm: qap.VisionModel, question: str, size: tuple[int, int]) -> list[_core.Chunk]:
    from qap_gguf.generation.messages import read_messages

    prompt = vlm._template.render(read_messages([{"role": "user", "content": [b"picture", question]}])).text
    return vlm._encoder.tokenize(prompt, [size], add_special=True)
