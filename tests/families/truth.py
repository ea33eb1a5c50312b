"""What transformers makes of a picture: features and logits, from pixels that need no resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

Array = npt.NDArray[Any]


def flatten_qwen(pixels: Any, patch: int, merge: int = 2, temporal: int = 2) -> tuple[Any, Any]:
    """Qwen-VL's image processor for one still picture: (C, H, W) to rows of patches in merged order, and the grid."""
    channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    frames = pixels[None].repeat(temporal, 1, 1, 1)
    x = frames.reshape(1, temporal, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(rows * columns, channels * temporal * patch * patch), torch.tensor([[1, rows, columns]])


def inputs(name: str, model: Any, pixels: Any) -> dict[str, Any]:
    """Arguments of get_image_features() for normalised pixels (C, H, W)."""
    _, height, width = pixels.shape
    if name.startswith("qwen"):
        values, grid = flatten_qwen(pixels, model.config.vision_config.patch_size)
        return {"pixel_values": values, "image_grid_thw": grid}
    if name == "smolvlm":
        return {"pixel_values": pixels[None, None]}
    if name in ("pixtral", "mistral-3"):
        return {"pixel_values": pixels[None], "image_sizes": torch.tensor([[height, width]])}
    if name == "lfm2-vl":
        size = model.config.vision_config.patch_size
        x = pixels.reshape(3, height // size, size, width // size, size).permute(1, 3, 2, 4, 0)
        return {
            "pixel_values": x.reshape(1, -1, size * size * 3),
            "spatial_shapes": torch.tensor([[height // size, width // size]]),
            "pixel_attention_mask": torch.ones(1, (height // size) * (width // size), dtype=torch.int32),
        }
    return {"pixel_values": pixels[None]}


def features(name: str, model: Any, pixels: Any) -> Array:
    """Projected rows of one picture, (n_tok, n_embd), DeepStack's planes behind the main one."""
    with torch.no_grad():
        out = model.model.get_image_features(**inputs(name, model, pixels))
    main = getattr(out, "pooler_output", out)
    planes = getattr(out, "deepstack_features", None)
    if isinstance(main, (list, tuple)):
        main = torch.cat([m.reshape(-1, m.shape[-1]) for m in main])
    main = main.reshape(-1, main.shape[-1])
    if planes is not None:
        planes = [torch.cat(list(p)) if isinstance(p, (list, tuple)) else p for p in planes]
        main = torch.cat([main, *planes], dim=-1)
    return np.asarray(main.numpy())
