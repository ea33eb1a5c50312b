"""The whole way with a CLIP text tower in the mmproj: hidden states, relevance of the prompt, selection."""

from __future__ import annotations

import numpy as np
import pytest

import qap_gguf as qap
from clip_text.conftest import Clip

PROMPT = "a red house"


def test_auto_takes_the_tower_when_there_is_a_prompt(clip: Clip) -> None:
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(1).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    with qap.VisionModel(clip.mmproj, clip.model, n_ctx=128, n_threads=1) as vlm:
        image = vlm.encode(pixels)
        assert image.hidden is not None
        assert vlm.signals(image, PROMPT).available() == ("clip_text", "cls", "text", "attention")
        auto = vlm.score(image, qap.PruneConfig(n_keep=4), PROMPT)
        cls = vlm.score(image, qap.PruneConfig(n_keep=4))
        alone = qap.PruneConfig(n_keep=4, semantic="clip_text", alpha=1.0, select="topk")
        named = vlm.prune(image, alone, PROMPT)

        # transformers: the same hidden states through post_layernorm and visual_projection, against its text embedding
        with torch.no_grad():
            vision = clip.hf.vision_model.post_layernorm(torch.tensor(image.hidden))
            patches = clip.hf.visual_projection(vision).numpy()
            text = clip.hf.get_text_features(torch.tensor([clip.ids(PROMPT)]))
        vector = getattr(text, "pooler_output", text)[0].numpy()
        cosine = patches @ vector / (np.linalg.norm(patches, axis=1) * np.linalg.norm(vector))
        want = qap.reference.minmax(-cosine)

        assert ((auto.semantic - want) ** 2).sum() / (want**2).sum() <= 1e-5
        assert not np.allclose(auto.semantic, cls.semantic)
        assert named.indices.tolist() == qap.reference.topk(want, 4).tolist()
        answer = vlm.generate([image, PROMPT], prune=qap.PruneConfig(n_keep=4, semantic="clip_text"), max_tokens=3)
        assert isinstance(answer, str)


def test_another_question_keeps_other_tokens(clip: Clip) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    cfg = qap.PruneConfig(n_keep=3, semantic="clip_text", alpha=1.0)
    with qap.VisionModel(clip.mmproj, clip.model, n_ctx=128, n_threads=1) as vlm:
        image = vlm.encode(pixels)
        kept = {tuple(vlm.prune(image, cfg, prompt).indices) for prompt in ("house", "blue sky", "12 dogs", "why not?")}
        assert len(kept) > 1
        with pytest.raises(qap.UnsupportedError, match="pass one"):
            vlm.prune(image, cfg)
