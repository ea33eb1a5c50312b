"""LLaVA in its authors' layout gives, byte for byte, the files that the same weights give in transformers' layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from convert.original_layout import original_layout
from convert.test_errors import read_safetensors, write_safetensors
from qap_gguf.convert import convert
from qap_gguf.convert.llava.original import original_name, translate
from qap_gguf.convert.llava.spec import parse
from qap_gguf.errors import ConvertError

QWEN = {"head_dim": 16, "num_key_value_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"language": "Mistral", "text": {"sliding_window": 128}},
    "qwen2": {"language": "Qwen2", "text": QWEN},
    "siglip": {"siglip": True},
    "next": {"kind": "LlavaNext", "top": {"image_grid_pinpoints": [[28, 56], [84, 28]]}},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_layouts_give_the_same_files(make_llava: Any, tmp_path: Path, kind: str) -> None:
    source = make_llava(**KINDS[kind])
    want = convert(source, tmp_path / "want", quantize="F16", name="t")
    for inside in (False, True):
        place = tmp_path / f"inside-{inside}"
        place.mkdir()
        folder = original_layout(source, place / "llava", place / "tower", inside=inside)
        got = convert(folder, place / "out", quantize="F16", name="t", vision_tower=place / "tower")
        assert got.model.read_bytes() == want.model.read_bytes()
        assert got.mmproj.read_bytes() == want.mmproj.read_bytes()


def test_a_tower_that_is_inside_wins(plain_llava: Path, tmp_path: Path) -> None:
    """It was trained on with the rest; the folder then only says how it is built."""
    want = convert(plain_llava, tmp_path / "want", quantize="F16", name="t")
    folder = original_layout(plain_llava, tmp_path / "llava", tmp_path / "tower", inside=True)
    path = tmp_path / "tower" / "model.safetensors"
    other = {name: (kind, shape, bytes(len(raw))) for name, (kind, shape, raw) in read_safetensors(path).items()}
    write_safetensors(path, other)
    got = convert(folder, tmp_path / "got", quantize="F16", name="t", vision_tower=tmp_path / "tower")
    assert got.mmproj.read_bytes() == want.mmproj.read_bytes()


def test_public_towers_are_known_by_name() -> None:
    config = {"architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"}
    clip = parse(translate(config | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, None)).vision
    assert (clip.image_size, clip.n_layer, clip.n_layer_used, clip.n_tokens, clip.act) == (
        336,
        24,
        23,
        576,
        "quick_gelu",
    )
    siglip = parse(translate(config | {"mm_vision_tower": "google/siglip-so400m-patch14-384"}, None)).vision
    assert (siglip.kind, siglip.n_layer, siglip.n_layer_used, siglip.n_tokens) == ("siglip", 27, 26, 729)


def test_without_a_tower_it_is_asked_for(plain_llava: Path, tmp_path: Path) -> None:
    folder = original_layout(plain_llava, tmp_path / "llava", tmp_path / "tower")
    with pytest.raises(ConvertError, match=r"--vision-tower.*someone/tower.*carries no tower"):
        convert(folder, tmp_path / "out")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "tower")
    folder = original_layout(plain_llava, tmp_path / "llava", tmp_path / "tower", inside=True)
    with pytest.raises(ConvertError, match=r"--vision-tower.*'someone/tower'"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tower_beside_transformers_layout_is_refused(plain_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="original layout"):
        convert(plain_llava, tmp_path / "out", vision_tower=plain_llava)
    assert not (tmp_path / "out").exists()


def test_another_tower_is_refused(plain_llava: Path, make_llava: Any, tmp_path: Path) -> None:
    folder = original_layout(plain_llava, tmp_path / "llava", tmp_path / "tower")
    with pytest.raises(ConvertError, match="expected a CLIP or SigLIP, got model_type 'llava'"):
        convert(folder, tmp_path / "out", vision_tower=plain_llava)
    other = make_llava(vision={"hidden_size": 64})
    original_layout(other, tmp_path / "other", tmp_path / "wide")
    with pytest.raises(ConvertError, match=r"expected shape \[64, 64\] of model\.mm_projector\.0\.weight"):
        convert(folder, tmp_path / "out", vision_tower=tmp_path / "wide")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'mlp2x_gelu'"),
        ({"mm_projector_type": None}, "mm_projector_type"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type None"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end False"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'patch'"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
        ({"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"}, "anyres_max_9"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "'flat'"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, "grid points"),
        ({"mm_vision_select_layer": [1, 2]}, "one vision_feature_layer"),
    ],
)
def test_what_the_files_could_not_say_is_refused(
    plain_llava: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = original_layout(plain_llava, tmp_path / "llava", tmp_path / "tower", **change)
    with pytest.raises(ConvertError, match=words) as caught:
        convert(folder, tmp_path / "out", vision_tower=tmp_path / "tower")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_names_and_old_configs(plain_llava: Path, tmp_path: Path) -> None:
    assert original_name("model.vision_tower.vision_tower.vision_model.post_layernorm.bias") == (
        "vision_tower.vision_model.post_layernorm.bias"
    )
    assert original_name("something.else") == "something.else"
    # CLIP's own file of 2021: the section stands twice, and the second counts.
    folder = original_layout(plain_llava, tmp_path / "llava", tmp_path / "tower")
    path = tmp_path / "tower" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vision_config": {}, "vision_config_dict": config["vision_config"]}))
    convert(folder, tmp_path / "out", quantize="F16", vision_tower=tmp_path / "tower")
