"""Choices of an early drop in torch: the tower is the checkpoint's, and each keeps what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from parity.built import dino_with_a_random_tower

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
ec: Any = pytest.importorskip("early_choice")

pytestmark = pytest.mark.parity
N = 256


def halfway(seed: int, n: int = N) -> Any:
    rng = np.random.default_rng(seed)
    wanted = np.sort(rng.choice(n, 64, replace=False)).astype(np.int32)
    return ec.Halfway(rng.standard_normal((n, 8)).astype(np.float32), rng.random(n).astype(np.float32), wanted)


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from(list(ec.CHOICES)))
def test_a_choice_is_so_many_different_ones(seed: int, choice: str) -> None:
    kept = ec.CHOICES[choice](halfway(seed), N // 2)
    assert len(kept) == N // 2
    assert (np.diff(kept) > 0).all()
    assert kept[-1] < N


def test_choices_keep_what_they_say() -> None:
    known = halfway(1)
    lines = known.total.reshape(16, 16)
    assert set(known.wanted) <= set(ec.CHOICES["oracle"](known, N // 2))
    assert set(ec.CHOICES["best"](known, N // 2)) == set(np.argsort(-known.total)[: N // 2])
    kept = np.isin(np.arange(N), ec.CHOICES["block2"](known, N // 2)).reshape(16, 16)
    for row in range(0, 16, 2):
        for column in range(0, 16, 2):
            block, of = kept[row : row + 2, column : column + 2], lines[row : row + 2, column : column + 2]
            assert block.sum() == 2
            assert of[block].min() > of[~block].max()


def test_what_was_dropped_is_stood_for() -> None:
    """Two kinds of patches; all of one kind but one were dropped, and still that one is kept first."""
    hidden = np.zeros((30, 2), np.float32)
    hidden[:2, 0] = hidden[2:, 1] = 1
    known = ec.Halfway(hidden, np.linspace(1, 0, 30, dtype=np.float32), np.array([2], np.int32))
    kept = np.arange(3, dtype=np.int32)
    left = ec.Left(known, kept, np.array([3, 2, 1], np.float32), hidden[kept], known.wanted)
    assert ec.FINALS["left"](left, 1).tolist() == [0]
    assert ec.FINALS["all"](left, 1).tolist() == [2]
    assert ec.FINALS["oracle"](left, 1).tolist() == [2]


def test_the_tower_is_the_checkpoints(tmp_path: Path) -> None:
    folder = dino_with_a_random_tower(tmp_path / "dino-vl")
    tower, picture = ec.Tower(folder), tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)).save(picture)
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        start = tower.start(picture)
        hidden, attention = tower.layers(start, 0, tower.n_layers)
        assert start.shape[1] == 1 + N
        whole = model.model.vision_tower.encoder(start)
        again = model.model.vision_tower.encoder.layer[-1]
        assert torch.allclose(hidden, whole[0], atol=1e-5)
        before = start
        for layer in model.model.vision_tower.encoder.layer[:-1]:
            before = layer(before)
        weights = again.attention(again.layernorm_before(before))[1].mean(1)[0, 0, 1:]
    np.testing.assert_allclose(attention, weights.numpy(), rtol=1e-4)
