"""The gate's rules for each projector type, each on a file that breaks this rule alone.

Without them such a file ends the process: an assertion of ggml, a null pointer, or a loop without an end. That whole
files pass and run is in test_mutations.py, the rules for LLaVA and for all types in test_gate.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from gguf_mutations import Gguf
from qap_gguf import _core
from qap_gguf.errors import ModelFileError, QapError
from qap_gguf.files.gguf import check_mmproj
from robust.test_gate import BF16_TYPE, F16_TYPE, I32, U32, Shapes, V, changed, value
from tiny_mmproj import PROJECTORS, tiny_mmproj, window_projector

Case = tuple[dict[str, Any], Shapes]  # keys and tensors that are replaced, added or (None) dropped


def number(name: str, n: int | None) -> dict[str, Any]:
    return {V + name: None if n is None else value(U32, n)}


WINDOW: Case = (
    number("patch_size", 57), {name: ([57, 57, 3, 64], 1) for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")}
)  # fmt: skip

OFFSETS = V + "projector.spatial_offsets"
#: Granite's tower with rows of 32 numbers
NARROW: Case = (
    number("embedding_length", 32),
    {
        tensor.name.decode(): ([32 if dim == 64 else dim for dim in tensor.dims], tensor.kind)
        for tensor in Gguf(tiny_mmproj("granite4_vision")).tensors
        if not tensor.name.startswith(b"v.position")
    } | {"v.position_embd.weight": ([32, 64], 0)},
)  # fmt: skip


def points(sides: list[int] | None) -> dict[str, Any]:
    return {V + "image_grid_pinpoints": None if sides is None else value(I32, sides)}


BAD: dict[str, dict[str, Case]] = {
    "idefics3": {
        "no ffn_gate_exps.weight in block 1": ({}, {"v.blk.1.ffn_gate_exps.weight": ([64, 96, 2], 1)}),
        "no v.deepstack.0.fc1.weight": ({}, {"v.deepstack.0.fc1.weight": ([256, 64], 1)}),
    },
    "gemma3": {
        "64 positions": ({}, {"v.position_embd.weight": ([64, 65], 0)}),
        "mm.input_projection.weight in f32 or f16": ({}, {"mm.input_projection.weight": ([256, 64], BF16_TYPE)}),
    },
    "internvl": {
        "v.class_embd, found none": ({}, {"v.class_embd": None, "v.position_embd.weight": ([64, 64], 0)}),
        "attn_q_norm.weight of 16": (
            {}, {"v.blk.0.attn_q_norm.weight": ([64], 0), "v.blk.0.attn_k_norm.weight": ([64], 0)},
        ),
        "as many key heads": (number("attention.head_count_kv", 2), {}),
    },
    "qwen2vl_merger": {
        "no v.patch_embd.bias": ({}, {"v.patch_embd.bias": ([64], 0)}),
        "no v.class_embd": ({}, {"v.class_embd": ([64], 0)}),
        "weight.1, found none": ({}, {"v.patch_embd.weight.1": None}),
        "spatial_merge_size in 2..2": (number("spatial_merge_size", 4), {}),
        "as many key heads": (number("attention.head_count_kv", 2), {}),
        "a multiple of 4": (number("attention.head_count", 32), {}),
        "mm.0.weight of 256 x 256": ({}, {"mm.0.weight": ([64, 256], 1)}),
        "4096 have at most": (number("patch_size", 363) | number("image_size", 363), {}),
    },
    "qwen2.5vl_merger": {
        "n_wa_pattern, found none": (number("n_wa_pattern", None), {}),
        "n_wa_pattern in 1..": (number("n_wa_pattern", 0), {}),
        "projection_dim numbers, got 256": (number("projection_dim", 128), {}),
        "windows of 112 pixels to hold a token": WINDOW,
    },
    "qwen3vl_merger": {
        "v.patch_embd.bias, found none": ({}, {"v.patch_embd.bias": None}),
        "a square number of positions, got 63": ({}, {"v.position_embd.weight": ([64, 63], 0)}),
        "blk.1.attn_qkv.weight, found none": ({}, {"v.blk.1.attn_qkv.weight": None}),
        "blk.1.attn_qkv.bias, found none": ({}, {"v.blk.1.attn_qkv.bias": None}),
        "heads of 64 numbers together, got 32": (number("attention.head_dim", 8), {}),
        "deepstack.1.fc2.weight, found none": ({}, {"v.deepstack.1.fc1.weight": ([256, 80], 1)}),
        "deepstack.1.fc2.weight of 80 x 256": (
            {}, {"v.deepstack.1.fc1.weight": ([256, 80], 1), "v.deepstack.1.fc2.weight": ([80, 128], 1)},
        ),
    },
    "glm4v": {
        "v.patch_embd.bias, found none": ({}, {"v.patch_embd.bias": None}),
        "a square number of positions": ({}, {"v.position_embd.weight": ([64, 60], 0)}),
        "position_embd.weight in f32": ({}, {"v.position_embd.weight": ([64, 64], F16_TYPE)}),
        "attn_k_norm.weight of 16": ({}, {"v.blk.1.attn_k_norm.weight": ([64], 0)}),
        "patch_merger.weight of 2 x 2 x 64 x 80": ({}, {"mm.patch_merger.weight": ([2, 4, 64, 80], 1)}),
        "patch_merger.weight in f32 or f16": ({}, {"mm.patch_merger.weight": ([2, 2, 64, 80], BF16_TYPE)}),
        "mm.post_norm.weight, found none": ({}, {"mm.post_norm.weight": None}),
        "mm.gate.weight of 72 x 96": ({}, {"mm.gate.weight": ([72, 64], 1)}),
    },
    "exaone4_5": {
        "no v.patch_embd.bias": ({}, {"v.patch_embd.bias": ([64], 0)}),
        "image_max_pixels, found none": (number("image_max_pixels", None), {}),
        "head_count_kv, found none": (number("attention.head_count_kv", None), {}),
        "attn_qkv.weight of 64 x 128": ({}, {"v.blk.0.attn_qkv.weight": ([64, 192], 1)}),
        "windows of 112 pixels to hold a token": WINDOW,
    },
    "paddleocr": {
        "image_min_pixels in 1..": (number("image_min_pixels", 0), {}),
        "position_embd.weight, found none": ({}, {"v.position_embd.weight": None}),
        "mm.input_norm.bias, found none": ({}, {"mm.input_norm.bias": None}),
        "mm.1.weight of 256 x 80": ({}, {"mm.1.weight": ([64, 80], 1)}),
    },
    "kimivl": {
        "scale_factor, found none": (number("projector.scale_factor", None), {}),
        "scale_factor in 2..64": (number("projector.scale_factor", 1), {}),
        "a square number of positions": ({}, {"v.position_embd.weight": ([64, 60], 0)}),
        "mm.input_norm.weight of 64": ({}, {"mm.input_norm.weight": ([256], 0)}),
    },
    "kimik25": {
        "position_embd.weight of 64 x 8 x 8": ({}, {"v.position_embd.weight": ([32, 8, 8], 0)}),
        "position_embd.weight in f32": ({}, {"v.position_embd.weight": ([64, 8, 8], F16_TYPE)}),
        "pixels of at least one token": (number("image_min_pixels", 1) | number("image_max_pixels", 255), {}),
    },
    "hunyuanvl": {
        "image_max_pixels in 1..": (number("image_max_pixels", 0) | number("image_min_pixels", None), {}),
        "spatial_merge_size in 2..2": (number("spatial_merge_size", 1), {}),
        "a square number of positions": ({}, {"v.position_embd.weight": ([64, 65], 0)}),
        "mm.0.weight of 2 x 2 x 64 x 80": ({}, {"mm.0.weight": ([2, 2, 32, 80], 1)}),
        "v.image_newline of 96": ({}, {"v.image_newline": ([256], 0)}),
        "mm.image_end of 256": ({}, {"mm.image_end": ([255], 0)}),
        "mm.model.fc.bias, found none": ({}, {"mm.model.fc.bias": None}),
    },
    "pixtral": {
        "spatial_merge_size in 1..1": ({}, {"mm.patch_merger.weight": None}),
        "mm.input_norm.weight, found none": ({}, {"mm.input_norm.weight": None}),
        "img_break of 256": ({}, {"v.token_embd.img_break": ([128], 0)}),
        "1024 have at most": (number("patch_size", 64) | number("spatial_merge_size", 64), {}),
        "a multiple of 4": (number("attention.head_count", 32), {}),
    },
    "lightonocr": {
        "spatial_merge_size in 1..1": ({}, {"mm.patch_merger.weight": None}),
        "mm.input_norm.weight, found none": ({}, {"mm.input_norm.weight": None}),
        "mm.1.weight of 64 x 80": ({}, {"mm.1.weight": ([256, 80], 1)}),
        "image_size in 1..32768, the longest edge of a picture, got 0": (number("image_size", 0), {}),
        "preproc_image_size in 1..32768, got 0": (number("preproc_image_size", 0), {}),
        "256 have at most": (number("patch_size", 64) | number("spatial_merge_size", 64), {}),
        "a multiple of 4": (number("attention.head_count", 32), {}),
    },
    "janus_pro": {
        "64 positions": ({}, {"v.position_embd.weight": ([64, 65], 0)}),
        "position_embd.weight, found none": ({}, {"v.position_embd.weight": None}),
        "mm.0.weight of 64 x 80": ({}, {"mm.0.weight": ([256, 80], 1)}),
        "mm.0.bias, found none": ({}, {"mm.0.bias": None}),
        "mm.1.bias, found none": ({}, {"mm.1.bias": None}),
        "mm.1.weight, found none": ({}, {"mm.1.weight": None}),
    },
    "lfm2": {
        "scale_factor, found none": (number("projector.scale_factor", None), {}),
        "fill a tile of 512 pixels": (number("patch_size", 14), {}),
        "position_embd.weight, found none": ({}, {"v.position_embd.weight": None}),
        "mm.input_norm.weight of 256": ({}, {"mm.input_norm.weight": ([64], 0)}),
    },
    "llama4": {
        "v.class_embd, found none": ({}, {"v.class_embd": None, "v.position_embd.weight": ([64, 64], 0)}),
        "65 positions": ({}, {"v.position_embd.weight": ([64, 64], 0)}),
        "patch_embd.weight of 192 x 64": ({}, {"v.patch_embd.weight": ([8, 8, 3, 64], 1)}),
        "merged evenly": (number("projector.scale_factor", 3), {}),
        "attn_post_norm.bias of 64": ({}, {"v.blk.0.attn_post_norm.bias": ([32], 0)}),
        "mlp.2.weight of 80 x 72": ({}, {"mm.model.mlp.2.weight": ([72, 72], 1)}),
    },
    "gemma4v": {
        "at least 2240 positions of a side, got 2239": ({}, {"v.position_embd.weight": ([64, 2239, 2], 0)}),
        "position_embd.weight of 64 x 4480 x 2": ({}, {"v.position_embd.weight": ([64, 4480], 0)}),
        "position_embd.weight, found none": ({}, {"v.position_embd.weight": None}),
        "a multiple of 4": (number("attention.head_count", 32), {}),
        "v.std_scale of 64": ({}, {"v.std_scale": ([32], 0)}),
        "mm.input_projection.weight of 64 x 256": ({}, {"mm.input_projection.weight": ([256, 256], 1)}),
        "1120 have at most": (
            number("patch_size", 22) | number("image_size", 64) | number("projector.scale_factor", 64), {},
        ),
    },
    "gemma4uv": {
        "at least 1120 positions of a side, got 1119": ({}, {"v.position_embd.weight": ([64, 1119, 2], 0)}),
        "patch_embd.weight of 768 x 64": ({}, {"v.patch_embd.weight": ([16, 16, 3, 64], 1)}),
        "patch_embd.bias, found none": ({}, {"v.patch_embd.bias": None}),
        "patch_norm.1.weight of 768": ({}, {"v.patch_norm.1.weight": ([64], 0)}),
        "patch_norm.2.weight in f32": ({}, {"v.patch_norm.2.weight": ([64], F16_TYPE)}),
        "patch_norm.3.bias, found none": ({}, {"v.patch_norm.3.bias": None}),
        "mm.input_projection.weight of 64 x 256": ({}, {"mm.input_projection.weight": ([32, 256], 1)}),
        "1120 have at most": (number("patch_size", 22) | number("projector.scale_factor", 64), {}),
    },
    "minicpmv4_6": {
        "scale_factor 2 or 4, got 3": (number("projector.scale_factor", 3), {}),
        "scale_factor in 2..4": (number("projector.scale_factor", 1), {}),
        "slices of 4..70 patches a side, got 3": (number("image_size", 24), {}),
        "slices of 4..70 patches a side, got 71": (number("image_size", 568), {}),
        "expected 4900 positions, got 4899": ({}, {"v.position_embd.weight": ([64, 4899], 0)}),
        "as many key heads": (number("attention.head_count_kv", 2), {}),
        "wa_layer_indexes in 0..1": ({V + "wa_layer_indexes": value(I32, [2])}, {}),
        "vit_merger.attn_k.weight of 64 x 64": ({}, {"v.vit_merger.attn_k.weight": ([64, 32], 1)}),
        "vit_merger.ds_ln.weight of 256": ({}, {"v.vit_merger.ds_ln.weight": ([64], 0)}),
        "vit_merger.ds_ffn_down.weight of 80 x 64": ({}, {"v.vit_merger.ds_ffn_down.weight": ([64, 80], 1)}),
        "mm.input_norm.weight of 256": ({}, {"mm.input_norm.weight": ([64], 0)}),
        "mm.down.weight of 80 x 256": ({}, {"mm.down.weight": ([72, 256], 1)}),
    },
    "granite4_vision": {
        "no v.class_embd": ({}, {"v.class_embd": ([64], 0)}),
        "position_embd.weight of 64 x 64": ({}, {"v.position_embd.weight": ([64, 65], 0)}),
        "as many key heads": (number("attention.head_count_kv", 2), {}),
        "feature_layer in 0..1, got 2": ({V + "feature_layer": value(I32, [2])}, {}),
        "feature_layer in 0..1, got -1": ({V + "feature_layer": value(I32, [-1])}, {}),
        "got 2 and 1": ({V + "feature_layer": value(I32, [0, 1])}, {}),
        "got 0 and 1": ({V + "feature_layer": None}, {}),
        "proj_blk.1.img_pos, found none": (
            {V + "feature_layer": value(I32, [0, 1]), OFFSETS: value(I32, [-1, 0])}, {},
        ),
        "window_side, found none": (number("projector.window_side", None), {}),
        "windows that divide 8 patches of a side": (number("projector.window_side", 3), {}),
        "and queries that divide windows, got 4 and 3": (number("projector.query_side", 3), {}),
        "windows of two queries a side": (
            {OFFSETS: value(I32, [0])} | number("projector.query_side", 4), {"v.proj_blk.0.query": ([64, 16], 0)},
        ),
        "proj_blk.0.query of 64 x 4": ({}, {"v.proj_blk.0.query": ([64, 16], 0)}),
        "proj_blk.0.img_pos in f32": ({}, {"v.proj_blk.0.img_pos": ([64, 16], F16_TYPE)}),
        "cross_attn_v.weight of 64 x 64": ({}, {"v.proj_blk.0.cross_attn_v.weight": ([64, 32], 1)}),
        "self_attn_norm.bias, found none": ({}, {"v.proj_blk.0.self_attn_norm.bias": None}),
        "ffn_down.weight of 96 x 64": ({}, {"v.proj_blk.0.ffn_down.weight": ([64, 64], 1)}),
        "linear.weight of 64 x 128": (number("projection_dim", 128), {}),
        "v.image_newline of 256": ({}, {"v.image_newline": ([128], 0)}),
        "whole heads of 64 numbers, got 32": NARROW,
        "pairs of numbers as clip.vision.image_grid_pinpoints, got 0": (points(None), {}),
        "pairs of numbers as clip.vision.image_grid_pinpoints, got 3": (points([64, 64, 128]), {}),
        "whole tiles of 64 pixels, got 64 x 96": (points([64, 64, 64, 96]), {}),
        "tiles of 46000 pixels one after another, got 46720": (points([64 * 27, 64 * 27]), {}),
    },
}  # fmt: skip
CASES = [(projector, expected) for projector, cases in BAD.items() for expected in cases]


def test_every_projector_that_can_be_pruned_has_rules_and_damaged_files() -> None:
    """mlp is the packaged model's, in test_gate.py."""
    assert set(BAD) == set(PROJECTORS) == set(_core.projectors("layout")) - {"mlp"}


@pytest.mark.parametrize(("projector", "expected"), CASES)
def test_a_file_at_odds_with_itself(projector: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(changed(Gguf(tiny_mmproj(projector)), *BAD[projector][expected]))
    with pytest.raises(ModelFileError) as error:
        check_mmproj(path)
    text = str(error.value)
    assert expected in text
    assert "\n" not in text
    assert text.isascii()


def test_what_is_unusual_and_right_passes(tmp_path: Path) -> None:
    """The width is that of one plane, which is what the language model's embeddings have."""
    good: list[tuple[str, Case]] = [
        ("qwen3vl_merger", ({}, {"v.deepstack.1.fc1.weight": ([256, 80], 1),
                                 "v.deepstack.1.fc2.weight": ([80, 256], 1)})),
        ("glm4v", ({}, {"v.position_embd.weight": None, "mm.post_norm.bias": None})),  # GLM-OCR has no table
        ("qwen2.5vl_merger", (number("patch_size", 56),
                              {f"v.patch_embd.weight{end}": ([56, 56, 3, 64], 1) for end in ("", ".1")})),
        ("exaone4_5", (number("n_wa_pattern", 0) | number("projection_dim", 9), {})),  # no windows
        ("pixtral", (number("spatial_merge_size", 1), {"mm.patch_merger.weight": None, "mm.input_norm.weight": None})),
        ("lightonocr", (number("image_size", 0) | number("preproc_image_size", 1540), {})),
        ("kimik25", ({}, {"v.position_embd.weight": ([64, 5, 7], 0)})),
        ("llama4", ({}, {"v.blk.0.ln2.weight": None, "v.blk.0.ln2.bias": None,  # files of llama.cpp's converter
                         "v.blk.0.attn_post_norm.weight": ([64], 0), "v.blk.0.attn_post_norm.bias": ([64], 0)})),
        ("lfm2", ({}, {"mm.input_norm.weight": None, "mm.input_norm.bias": None})),
        ("gemma4v", (number("projector.scale_factor", None), {"v.position_embd.weight": ([64, 3360, 2], 0)})),
        ("minicpmv4_6", (number("projector.scale_factor", 2), {"v.vit_merger.ln1.weight": None})),  # the mode "4x"
        ("granite4_vision", ({V + "feature_layer": value(I32, [0, 1]), OFFSETS: value(I32, [-1, 0])},
                             {name: (dims, kind) for name, dims, kind in window_projector(1)})),
    ]  # fmt: skip
    for projector, case in good:
        path = tmp_path / f"{projector}.gguf"
        path.write_bytes(changed(Gguf(tiny_mmproj(projector)), *case))
        assert check_mmproj(path) == 256, projector


def test_hunyuan_is_refused_beside_a_language_model_without_axes(
    packaged: qap.PackagedModel, plain_model: Path, tmp_path: Path
) -> None:
    """The first of them would end in an assertion of upstream's, the second in a wrong number of rows."""
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(tiny_mmproj("hunyuanvl"))
    for model in (plain_model, packaged.model):
        with pytest.raises(QapError, match="expected a language model with M-RoPE beside the projector hunyuanvl"):
            qap.VisionModel(path, model, n_ctx=256, n_threads=1)
