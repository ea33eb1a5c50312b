"""LLaVA with a SigLIP tower: no class token, so `auto` means the attention that a patch receives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import qap_gguf as qap
from parity.test_vision import LIMIT, image_features, nmse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("flash", [False, True], ids=["no flash attention", "flash attention"])
def test_features_and_received_attention(make_llava: Callable[..., Path], tmp_path: Path, flash: bool) -> None:
    folder = make_llava(siglip=True, top={"vision_feature_layer": -2})
    files = qap.convert(folder, tmp_path, quantize="F32", keep_positions=False, mmproj_type="f32")
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = np.random.default_rng(6).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    mean, std = np.array([0.1, 0.2, 0.3], "f4"), np.array([0.4, 0.5, 0.6], "f4")  # of make_llava's processor
    values = torch.tensor((((pixels.astype("f4") / 255) - mean) / std).transpose(2, 0, 1)[None])
    want = image_features(hf, values)
    tower = hf.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        layers = tower(values, output_attentions=True).attentions
    received = layers[len(layers) - 2][0].mean((0, 1)).numpy()

    # flash attention keeps k and v in f16: the features are as near as that allows
    limit = 1e-5 if not flash else 1e-4
    with qap.VisionModel(files.mmproj, files.model, n_ctx=128, n_threads=1, flash_attn=flash) as vlm:
        image = vlm.encode(pixels)
        print(f"SigLIP encoder NMSE {nmse(image.features, want):.1e}")
        assert nmse(image.features, want) <= limit
        assert image.attention is None
        assert image.received is not None
        assert nmse(image.received, received) <= limit
        assert vlm.signals(image).available() == ("attention",)
        scores = vlm.score(image, qap.PruneConfig(alpha=1.0, n_keep=4))
        assert nmse(scores.semantic, qap.reference.minmax(received)) <= 100 * LIMIT
        with pytest.raises(qap.UnsupportedError, match="cannot give cls; use one of attention, none"):
            vlm.prune(image, qap.PruneConfig(semantic="cls"))
