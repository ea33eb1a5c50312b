"""The mmproj file: golden metadata and tensors, and which layers are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qap_gguf.config import PruneConfig
from qap_gguf.convert import convert
from qap_gguf.convert.source.checkpoint import Checkpoint
from qap_gguf.errors import ConvertError

LAYER = {
    "ln1.weight": (32,), "ln1.bias": (32,), "ln2.weight": (32,), "ln2.bias": (32,),
    "attn_q.weight": (32, 32), "attn_q.bias": (32,), "attn_k.weight": (32, 32), "attn_k.bias": (32,),
    "attn_v.weight": (32, 32), "attn_v.bias": (32,), "attn_out.weight": (32, 32), "attn_out.bias": (32,),
    "ffn_up.weight": (48, 32), "ffn_up.bias": (48,), "ffn_down.weight": (32, 48), "ffn_down.bias": (32,),
}  # fmt: skip
REST = {
    "v.class_embd": (32,), "v.patch_embd.weight": (32, 3, 7, 7), "v.position_embd.weight": (17, 32),
    "v.pre_ln.weight": (32,), "v.pre_ln.bias": (32,),
    "mm.0.weight": (64, 32), "mm.0.bias": (64,), "mm.2.weight": (64, 64), "mm.2.bias": (64,),
}  # fmt: skip
SOURCE = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip


def fields(path: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def source_name(name: str) -> str:
    """The canonical checkpoint name of an mmproj tensor, spelled out apart from the converter's own tables."""
    tower = "vision_tower.vision_model."
    plain = {
        "v.class_embd": f"{tower}embeddings.class_embedding",
        "v.patch_embd.weight": f"{tower}embeddings.patch_embedding.weight",
        "v.patch_embd.bias": f"{tower}embeddings.patch_embedding.bias",
        "v.position_embd.weight": f"{tower}embeddings.position_embedding.weight",
    }
    if name in plain:
        return plain[name]
    stem, part = name.rsplit(".", 1)
    if stem == "v.pre_ln":
        return f"{tower}pre_layrnorm.{part}"
    if stem in ("mm.0", "mm.2"):
        return f"multi_modal_projector.linear_{1 if stem == 'mm.0' else 2}.{part}"
    _, _, layer, kind = stem.split(".")
    return f"{tower}encoder.layers.{layer}.{SOURCE[kind]}.{part}"


def test_golden_metadata_and_tensors(plain_llava: Path, tmp_path: Path) -> None:
    path = convert(plain_llava, tmp_path, quantize="F16", name="tiny").mmproj
    assert path == tmp_path / "mmproj-f16.gguf"
    got = fields(path)
    assert got == {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": "tiny",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.use_silu": False,
        "clip.vision.image_size": 28,
        "clip.vision.patch_size": 7,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 48,
        "clip.vision.projection_dim": 64,
        "clip.vision.block_count": 3,
        "clip.vision.feature_layer": [3],
        "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "clip.vision.image_mean": pytest.approx([0.1, 0.2, 0.3]),
        "clip.vision.image_std": pytest.approx([0.4, 0.5, 0.6]),
    }
    listing = tensors(path)
    layers = {f"v.blk.{i}.{name}": shape for i in range(3) for name, shape in LAYER.items()}
    assert {n: tuple(int(d) for d in reversed(t.shape)) for n, t in listing.items()} == REST | layers
    for name, tensor in listing.items():
        small = tensor.data.ndim == 1 or name == "v.position_embd.weight"
        assert tensor.tensor_type.name == ("F32" if small else "F16"), name


@pytest.mark.parametrize(("layer", "used"), [(-1, 4), (-2, 3), (1, 1), (-4, 1)])
def test_only_the_layers_that_run_are_stored(make_llava: Any, tmp_path: Path, layer: int, used: int) -> None:
    folder = make_llava(top={"vision_feature_layer": layer})
    path = convert(folder, tmp_path, quantize="F16", mmproj_type="f32").mmproj
    got = fields(path)
    assert (got["clip.vision.block_count"], got["clip.vision.feature_layer"]) == (used, [used])
    names = set(tensors(path))
    assert {n.split(".")[2] for n in names if n.startswith("v.blk.")} == {str(i) for i in range(used)}
    assert not [n for n in names if "post_ln" in n]


@pytest.mark.parametrize("siglip", [False, True])
def test_values_equal_the_checkpoint(make_llava: Any, tmp_path: Path, siglip: bool) -> None:
    folder = make_llava(siglip=siglip)
    path = convert(folder, tmp_path, quantize="F16", mmproj_type="f32").mmproj
    source = Checkpoint(folder).tensors
    listing = tensors(path)
    assert len(listing) == len(REST) + 3 * len(LAYER) - (
        2 if siglip else 0
    )  # less class, pre-norm; plus the patch bias
    for name, tensor in listing.items():
        np.testing.assert_array_equal(tensor.data, source[source_name(name)].read(), err_msg=name)
    assert fields(path)["clip.use_gelu"] is siglip  # SigLIP's tower uses gelu-tanh, CLIP's quick_gelu
    assert fields(path)["general.file_type"] == 0


@pytest.mark.parametrize(
    ("act", "gelu", "silu"), [("gelu", True, False), ("silu", False, True), ("quick_gelu", False, False)]
)
def test_activation_of_the_tower(make_llava: Any, tmp_path: Path, act: str, gelu: bool, silu: bool) -> None:
    got = fields(convert(make_llava(vision={"hidden_act": act}), tmp_path, quantize="F16").mmproj)
    assert (got["clip.use_gelu"], got["clip.use_silu"]) == (gelu, silu)


def test_a_projector_without_bias_gets_zeros(make_llava: Any, tmp_path: Path) -> None:
    listing = tensors(convert(make_llava(top={"multimodal_projector_bias": False}), tmp_path, quantize="F16").mmproj)
    assert not listing["mm.0.bias"].data.any()
    assert not listing["mm.2.bias"].data.any()
    assert listing["mm.2.bias"].data.shape == (64,)


def test_prune_defaults_are_stored(plain_llava: Path, tmp_path: Path) -> None:
    config = PruneConfig(n_keep=5, alpha=0.25, group_size=64)
    path = convert(plain_llava, tmp_path, quantize="F16", prune=config).mmproj
    got = {k: v for k, v in fields(path).items() if k.startswith("qap.")}
    assert got == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in config.to_metadata().items()}
    types = {k: f.types[0].name for k, f in gguf.GGUFReader(path).fields.items() if k.startswith("qap.")}
    assert types["qap.alpha"] == "FLOAT32"
    assert types["qap.n_keep"] == types["qap.group_size"] == types["qap.version"] == "UINT32"
    assert types["qap.alpha_dynamic"] == "BOOL"
    assert types["qap.error"] == "STRING"


def with_processor(plain: Path, folder: Path, name: str, config: dict[str, Any]) -> Path:
    """`plain` by hard links, with another image processor's config."""
    folder.mkdir()
    for file in plain.iterdir():
        if file.name != "preprocessor_config.json":
            (folder / file.name).hardlink_to(file)
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "config", "mean", "std"),
    [
        (
            "processor_config.json",
            {"image_processor": {"image_mean": [0.5, 0.6, 0.7], "image_std": [1, 2, 3]}},
            [0.5, 0.6, 0.7],
            [1, 2, 3],
        ),
        (
            "preprocessor_config.json",
            {"image_processor": {"image_mean": [0.5, 0.6, 0.7], "image_std": [1, 2, 3]}},
            [0.5, 0.6, 0.7],
            [1, 2, 3],
        ),
        ("preprocessor_config.json", {"do_normalize": False}, [0, 0, 0], [1, 1, 1]),
        ("preprocessor_config.json", {}, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    ],
)
def test_pixel_mean_and_deviation(
    plain_llava: Path, tmp_path: Path, name: str, config: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    got = fields(
        convert(with_processor(plain_llava, tmp_path / "in", name, config), tmp_path / "out", quantize="F16").mmproj
    )
    assert got["clip.vision.image_mean"] == pytest.approx(mean)
    assert got["clip.vision.image_std"] == pytest.approx(std)


@pytest.mark.parametrize(
    "config",
    [
        {"image_mean": [0.5]},
        {"image_std": [0, 0, 0]},
        {"image_mean": "x"},
        {"rescale_factor": 1.0},
        {"do_rescale": False},
    ],
)
def test_other_image_processors_are_refused(plain_llava: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = with_processor(plain_llava, tmp_path / "in", "preprocessor_config.json", config)
    with pytest.raises(ConvertError, match="image processor"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
