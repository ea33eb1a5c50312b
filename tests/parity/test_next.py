"""LLaVA-NeXT: what its mmproj file says, and each tile's features against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import qap_gguf as qap
from parity.test_vision import LIMIT, nmse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIDE = 28  # of make_llava's tower
PICTURES = {"wide": (1, 3), "tall": (2, 1)}  # rows and columns of tiles; no resize in between


@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
def test_tile_features_equal_transformers(make_llava: Callable[..., Path], tmp_path: Path, siglip: bool) -> None:
    grid = [[SIDE * rows, SIDE * columns] for rows, columns in PICTURES.values()]
    folder = make_llava(kind="LlavaNext", siglip=siglip, top={"image_grid_pinpoints": grid, "vision_feature_layer": -2}
                        | ({"vision_feature_select_strategy": "full"} if siglip else {}))  # fmt: skip
    files = qap.convert(folder, tmp_path, quantize="F32", keep_positions=False, mmproj_type="f32", name="t")
    reader = gguf.GGUFReader(files.mmproj)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert keys["clip.vision.image_grid_pinpoints"] == [3 * SIDE, SIDE, SIDE, 2 * SIDE]  # width, height of each

    hf = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    newline = next(t for t in reader.tensors if t.name == "v.image_newline")
    assert newline.tensor_type.name == "F32"
    np.testing.assert_array_equal(newline.data, hf.model.image_newline.detach().numpy())

    mean, std = np.array([0.1, 0.2, 0.3], "f4"), np.array([0.4, 0.5, 0.6], "f4")  # of make_llava's processor
    rng = np.random.default_rng(8)
    # One thread and no flash attention, which keeps k and v in f16: only the order of sums differs.
    with qap.VisionModel(files.mmproj, files.model, n_ctx=128, n_threads=1, flash_attn=False) as vlm:
        for name, (rows, columns) in PICTURES.items():
            picture = rng.integers(0, 256, (SIDE * rows, SIDE * columns, 3), dtype=np.uint8)
            tiles = [
                picture[SIDE * y : SIDE * (y + 1), SIDE * x : SIDE * (x + 1)]
                for y in range(rows)
                for x in range(columns)
            ]
            values = torch.tensor(np.stack([((t.astype("f4") / 255 - mean) / std).transpose(2, 0, 1) for t in tiles]))
            with torch.no_grad():
                hidden = hf.model.vision_tower(values, output_hidden_states=True).hidden_states[-2]
                want = hf.model.multi_modal_projector(hidden if siglip else hidden[:, 1:]).numpy()
            # the overview of a picture of a tile's size is that picture; packing: tests/families/test_next.py
            errors = [nmse(vlm.encode(tile).features[: len(w)], w) for tile, w in zip(tiles, want, strict=True)]
            print(f"{'SigLIP' if siglip else 'CLIP'} {name}: {len(tiles)} tiles, worst NMSE {max(errors):.1e}")
            assert max(errors) <= LIMIT
