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
from robust.test_gate import BF16_TYPE, F16_TYPE, U32, Shapes, V, changed, value
from tiny_mmproj import PROJECTORS, tiny_mmproj

Case = tuple[dict[str, Any], Shapes]  # keys and tensors that are replaced, added or (None) dropped


def number(name: str, n: int | None) -> dict[str, Any]:
    return {V + name: None if n is None else value(U32, n)}


WINDOW: Case = (
    number("patch_size", 57), {name: ([57, 57, 3, 64], 1) for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")}
)  # fmt: skip

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
        ("kimik25", ({}, {"v.position_embd.weight": ([64, 5, 7], 0)})),
        ("llama4", ({}, {"v.blk.0.ln2.weight": None, "v.blk.0.ln2.bias": None,  # files of llama.cpp's converter
                         "v.blk.0.attn_post_norm.weight": ([64], 0), "v.blk.0.attn_post_norm.bias": ([64], 0)})),
        ("lfm2", ({}, {"mm.input_norm.weight": None, "mm.input_norm.bias": None})),
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
