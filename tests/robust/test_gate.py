"""Each rule of the gate (native/src/gate) on a file that breaks this rule alone, and the other side of each limit."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from gguf_mutations import ARRAY, STRING, Gguf, Key, Tensor, write
from qap_gguf.errors import ModelFileError
from qap_gguf.files.gguf import check_language, check_mmproj, check_pair

U32, I32, F32, BOOL, U16 = 4, 5, 6, 7, 2
F16_TYPE, BF16_TYPE, Q8_0, Q8_1, I32_TYPE = 1, 30, 8, 9, 26
Shapes = Mapping[str, "tuple[list[int], int] | None"]


def value(kind: int, what: Any) -> tuple[int, bytes]:
    if kind == STRING:
        return STRING, struct.pack("<Q", len(what)) + what.encode()
    if isinstance(what, list):
        code = {U32: "I", I32: "i", F32: "f"}[kind]
        return ARRAY, struct.pack(f"<IQ{len(what)}{code}", kind, len(what), *what)
    return kind, struct.pack("<" + {U32: "I", I32: "i", F32: "f", BOOL: "?", U16: "H"}[kind], what)


def texts(items: list[bytes]) -> tuple[int, bytes]:
    return ARRAY, struct.pack("<IQ", STRING, len(items)) + b"".join(struct.pack("<Q", len(t)) + t for t in items)


def changed(file: Gguf, keys: Mapping[str, tuple[int, bytes] | None], tensors: Shapes | None = None) -> bytes:
    """The file with keys and tensors (dims, type) replaced, added, or dropped where the value is None."""
    kept = [key for key in file.keys if key.name.decode() not in keys]
    kept += [Key(name.encode(), *pair, 0) for name, pair in keys.items() if pair is not None]
    rows: dict[str, Tensor] = {tensor.name.decode(): tensor for tensor in file.tensors}
    for name, shape in (tensors or {}).items():
        if shape is None:
            del rows[name]
        else:
            old = rows.get(name, Tensor(name.encode(), [], 0, bytes(4), 0))
            rows[name] = dataclasses.replace(old, dims=shape[0], kind=shape[1])
    return write(kept, list(rows.values()))


@pytest.fixture(scope="module")
def files(packaged: qap.PackagedModel, plain_model: Path) -> dict[str, Gguf]:
    return {"mmproj": Gguf(packaged.mmproj.read_bytes()), "model": Gguf(plain_model.read_bytes())}


@pytest.fixture
def make(files: dict[str, Gguf], tmp_path: Path) -> Callable[..., Path]:
    def build(which: str, keys: Mapping[str, Any] | None = None, tensors: Shapes | None = None) -> Path:
        path = tmp_path / f"{which}.gguf"
        path.write_bytes(changed(files[which], keys or {}, tensors))
        return path

    return build


V, L, T = "clip.vision.", "llama.", "tokenizer.ggml."
BAD_MMPROJ: dict[str, tuple[dict[str, Any], Shapes]] = {
    # keys: types
    "clip.projector_type": ({"clip.projector_type": value(U32, 1)}, {}),
    "clip.use_gelu": ({"clip.use_gelu": value(U32, 0)}, {}),
    "image_size of type": ({V + "image_size": value(I32, 192)}, {}),
    "layer_norm_epsilon of type": ({V + "attention.layer_norm_epsilon": value(U32, 0)}, {}),
    "clip.has_audio_encoder": ({"clip.has_audio_encoder": value(U32, 1)}, {}),
    "clip.audio.num_mel_bins": ({"clip.audio.num_mel_bins": value(F32, 1.0)}, {}),
    # keys: numbers
    "heads share": ({V + "attention.head_count": value(U32, 5)}, {}),
    "at least one block": ({V + "attention.head_count": value(U32, 0)}, {}),
    "key heads that divide": ({V + "attention.head_count_kv": value(U32, 2)}, {}),
    "block_count in 0..1024": ({V + "block_count": value(U32, 1025)}, {}),
    "blk.5.attn_q.weight, found none": ({V + "block_count": value(U32, 6)}, {}),
    "patch_size in 1..1024": ({V + "patch_size": value(U32, 0)}, {}),
    "image_size in 0..8192": ({V + "image_size": value(U32, 8193)}, {}),
    "fit a side": ({V + "image_size": value(U32, 15)}, {}),
    "at least one patch": ({V + "image_size": value(U32, 0)}, {}),
    "145 positions": ({}, {"v.position_embd.weight": ([192, 144], 0)}),
    "197 positions": ({V + "image_size": value(U32, 224)}, {}),
    "3 numbers as clip.vision.image_mean": ({V + "image_mean": value(F32, [0.5, 0.5])}, {}),
    "image_mean, got none": ({V + "image_mean": None}, {}),
    "image_std to be finite": ({V + "image_std": value(F32, [0.5, 0.0, 0.5])}, {}),
    "image_mean to be finite": ({V + "image_mean": value(F32, [0.5, float("nan"), 0.5])}, {}),
    "layer_norm_epsilon in 0..1": ({V + "attention.layer_norm_epsilon": value(F32, -1.0)}, {}),
    "epsilon in 0..1, got nan": ({V + "attention.layer_norm_epsilon": value(F32, float("nan"))}, {}),
    "feature_layer in -1..5": ({V + "feature_layer": value(I32, [6])}, {}),
    "image_grid_pinpoints in 1..16384": ({V + "image_grid_pinpoints": value(I32, [0, 4])}, {}),
    "image_min_pixels up to": ({V + "image_min_pixels": value(U32, 9), V + "image_max_pixels": value(U32, 8)}, {}),
    "got both": ({"clip.use_gelu": value(BOOL, True), "clip.use_silu": value(BOOL, True)}, {}),
    # tensors
    "v.patch_embd.weight of 16 x 16 x 3 x 192": ({}, {"v.patch_embd.weight": ([16, 16, 4, 192], 1)}),
    "v.patch_embd.weight in f32 or f16": ({}, {"v.patch_embd.weight": ([16, 16, 3, 192], BF16_TYPE)}),
    "tensor v.position_embd.weight, found none": ({}, {"v.position_embd.weight": None}),
    "v.class_embd of 192": ({}, {"v.class_embd": ([191], 0)}),
    "attn_k.weight of 192 x 192": ({}, {"v.blk.3.attn_k.weight": ([192, 128], 1)}),
    "attn_q.bias in f32": ({}, {"v.blk.0.attn_q.bias": ([192], F16_TYPE)}),
    "attn_v.weight in f32, f16, bf16 or quantized": ({}, {"v.blk.0.attn_v.weight": ([192, 192], I32_TYPE)}),
    "got q8_1": ({}, {"v.blk.0.attn_v.weight": ([192, 192], Q8_1)}),
    "attn_out.weight, found none": ({}, {"v.blk.4.attn_out.weight": None}),
    "ffn_down.weight of 768 x 192": ({}, {"v.blk.2.ffn_down.weight": ([704, 192], 1)}),
    "ffn_up.bias of 768": ({}, {"v.blk.2.ffn_up.bias": ([192], 0)}),
    "got attn_qkv": ({}, {"v.blk.0.attn_qkv.weight": ([192, 576], 1)}),
    "ln1.weight of 192": ({}, {"v.blk.1.ln1.weight": ([96], 0)}),
    "mm.0.weight of 192 x 256": ({}, {"mm.0.weight": ([224, 256], 1)}),
    "mm.0.weight of 384 x 256": ({V + "feature_layer": value(I32, [4, 5])}, {}),
    "mm.2.weight of 256 x 256": ({}, {"mm.2.weight": ([128, 256], 1)}),
    "mm.2.bias, found none": ({}, {"mm.2.bias": None}),
    "mm.1.weight, found none": ({}, {"mm.3.weight": ([256, 256], 1)}),
}  # fmt: skip

BAD_MODEL: dict[str, tuple[dict[str, Any], Shapes]] = {
    "block_count in 1..512": ({L + "block_count": value(U32, 513)}, {}),
    "context_length in 1": ({L + "context_length": value(U32, 0)}, {}),
    "head_count in 1": ({L + "attention.head_count": value(U32, 0)}, {}),
    "head_count_kv in 1..4": ({L + "attention.head_count_kv": value(U32, 0)}, {}),
    "key heads that divide": ({L + "attention.head_count_kv": value(U32, 3)}, {}),
    "heads share": ({L + "attention.head_count": value(U32, 6), L + "attention.head_count_kv": value(U32, 6),
                     L + "attention.key_length": None}, {}),
    "one even length": ({L + "attention.value_length": value(U32, 32)}, {}),
    "rope.dimension_count in 64..64": ({L + "rope.dimension_count": value(U32, 32)}, {}),
    "rope.scaling.type none": ({L + "rope.scaling.type": value(STRING, "cubic")}, {}),
    "rope.freq_base in": ({L + "rope.freq_base": value(F32, float("inf"))}, {}),
    "rms_epsilon in 0..1": ({L + "attention.layer_norm_rms_epsilon": value(F32, float("nan"))}, {}),
    "expert_used_count from 1": ({L + "expert_count": value(U32, 8)}, {}),
    "expert_count in 0..1024": ({L + "expert_count": value(U32, 1025)}, {}),
    "groups that experts share": ({L + "expert_count": value(U32, 8), L + "expert_used_count": value(U32, 2),
                                   L + "expert_group_count": value(U32, 3)}, {}),
    "one number as": ({L + "attention.head_count": value(U32, [4, 4, 4, 4])}, {}),
    "nextn_predict_layers in 0..4": ({L + "nextn_predict_layers": value(U32, 5)}, {}),
    "blk.0.attn_norm.weight in f32": ({}, {"blk.0.attn_norm.weight": ([256], F16_TYPE)}),
    "blk.0.attn_q.weight in f32, f16": ({}, {"blk.0.attn_q.weight": ([256, 256], I32_TYPE)}),
    "rope_freqs.weight in f32": ({}, {"rope_freqs.weight": ([32], F16_TYPE)}),
    "token_embd.weight of 256 x 49152": ({}, {"token_embd.weight": ([256, 49151], Q8_0)}),
    "tokenizer.ggml.model of llama": ({T + "model": value(STRING, "none")}, {}),
    "a type for each": ({T + "token_type": value(I32, [1, 2])}, {}),
    "list of tokens": ({T + "tokens": None}, {}),
    "list of merges": ({T + "merges": None}, {}),
    "tokens that differ": ({T + "tokens": texts([b"a", b"b", b"a"]), T + "token_type": None}, {}),
    "token for each byte": ({T + "model": value(STRING, "llama"), T + "tokens": texts([b"a", b"b"])}, {}),
    "bos_token_id in the vocabulary": (
        {T + "tokens": texts([b"a", b"b"]), T + "bos_token_id": value(U32, 7),
         T + "add_bos_token": value(BOOL, True)}, {},
    ),
    "first of at most 512 parts": ({"split.count": value(U16, 3), "split.no": value(U16, 1)}, {}),
    "name that ends in -00001-of-": ({"split.count": value(U16, 3), "split.no": value(U16, 0)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("expected", BAD_MMPROJ)
def test_an_mmproj_at_odds_with_itself(make: Callable[..., Path], expected: str) -> None:
    with pytest.raises(ModelFileError) as error:
        check_mmproj(make("mmproj", *BAD_MMPROJ[expected]))
    text = str(error.value)
    assert expected in text
    assert "\n" not in text
    assert text.isascii()


@pytest.mark.parametrize("expected", BAD_MODEL)
def test_a_language_model_at_odds_with_itself(make: Callable[..., Path], expected: str) -> None:
    with pytest.raises(ModelFileError) as error:
        check_language(make("model", *BAD_MODEL[expected]))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_unusual_and_right_passes(make: Callable[..., Path], packaged: qap.PackagedModel) -> None:
    """The other side of the rules above."""
    good: list[tuple[dict[str, Any], Shapes]] = [
        ({V + "attention.head_count": value(U32, 4)}, {}),
        ({V + "block_count": value(U32, 4), V + "feature_layer": value(I32, [4])}, {}),
        ({V + "image_size": value(U32, 207)}, {}),  # 12 whole patches and a rest
        ({V + "image_mean": value(F32, [-1.0, 0.0, 1.0])}, {}),
        ({V + "feature_layer": None}, {}),
        ({V + "feature_layer": value(I32, [3, 5])}, {"mm.0.weight": ([384, 256], 1)}),
        ({}, {"v.position_embd.weight": ([192, 200], F16_TYPE)}),  # more rows than are looked up
        ({}, {"v.blk.0.attn_q.weight": ([192, 192], BF16_TYPE), "v.blk.0.attn_k.weight": ([192, 192], Q8_0)}),
        ({}, {"v.blk.0.ffn_up.weight": ([192, 640], 1), "v.blk.0.ffn_up.bias": ([640], 0),
              "v.blk.0.ffn_down.weight": ([640, 192], 1)}),
        ({}, {"v.blk.0.ffn_up.weight": ([768, 192], 1), "v.blk.0.ffn_up.bias": ([192], 0),
              "v.blk.0.ffn_down.weight": ([192, 768], 1), "v.blk.0.ffn_down.bias": ([768], 0)}),  # old files: swapped
        ({}, {"v.blk.0.attn_q.bias": None, "v.pre_ln.bias": None, "v.class_embd": None}),
    ]  # fmt: skip
    for keys, tensors in good:
        path = make("mmproj", keys, tensors)
        assert check_mmproj(path) == 256
        with qap.VisionModel(path, packaged.model, n_ctx=256, n_threads=1) as vlm:
            vlm.encode(packaged.sample)
    assert check_mmproj(make("mmproj", {}, {"mm.2.weight": ([256, 96], 1), "mm.2.bias": ([96], 0)})) == 96
    models: list[dict[str, Any]] = [
        {L + "rope.scaling.type": value(STRING, "yarn")},
        {L + "attention.key_length": None, L + "attention.value_length": None, L + "rope.dimension_count": None},
        {T + "add_bos_token": value(BOOL, True)},
        {T + "bos_token_id": value(U32, 2**32 - 1)},
        {L + "attention.head_count_kv": None},
        {"split.count": value(U16, 1)},
    ]
    for keys in models:
        path = make("model", keys)
        assert check_language(path) == 256
        with qap.VisionModel(packaged.mmproj, path, n_ctx=256, n_threads=1) as vlm:
            vlm.generate(["How many?"], max_tokens=1)


def test_a_pair_that_does_not_fit(make: Callable[..., Path], packaged: qap.PackagedModel) -> None:
    other = make("mmproj", {}, {"mm.2.weight": ([256, 96], 1), "mm.2.bias": ([96], 0)})
    with pytest.raises(ModelFileError, match=r"expected tokens of 256 numbers .* got 96"):
        check_pair(other, packaged.model)
    check_pair(packaged.mmproj, packaged.model)


def test_the_context_must_fit_the_memory(packaged: qap.PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    check_language(packaged.model, 4096)
    with pytest.raises(ModelFileError, match=r"expected to fit .* GB of (free|all) memory, needs .* GB"):
        check_language(packaged.model, 2**28)
    monkeypatch.setenv("QAP_MEMORY_CHECK", "0")
    check_language(packaged.model, 2**28)


def test_patches_of_a_picture_have_a_limit(make: Callable[..., Path]) -> None:
    """65,536 patches are only missing their weights; more are refused."""
    most = {V + "patch_size": value(U32, 32), V + "image_size": value(U32, 8192)}
    with pytest.raises(ModelFileError, match=r"expected v\.patch_embd"):
        check_mmproj(make("mmproj", most))
    with pytest.raises(ModelFileError, match="expected at most 65536 patches, got 66049"):
        check_mmproj(make("mmproj", {V + "patch_size": value(U32, 31), V + "image_size": value(U32, 31 * 257)}))


def test_the_stock_handler_meets_the_gate(make: Callable[..., Path], packaged: qap.PackagedModel) -> None:
    """The drop-in library refuses the file before clip.cpp reads it; QAP_DISABLE=1 would let it abort."""
    import llama_cpp.mtmd_cpp as lib

    from qap_gguf.language.opener import open_llama

    llama = open_llama(packaged.model, n_ctx=64, n_threads=1, verbose=False)
    params = lib.mtmd_context_params_default()
    bad = make("mmproj", {}, {"v.blk.3.attn_k.weight": ([192, 128], 1)})
    try:
        assert lib.mtmd_init_from_file(str(bad).encode(), llama.model, params) is None
    finally:
        llama.close()


LIMITS: list[tuple[str, str, int, int]] = [
    # which file, key, the last number that the check of numbers lets pass, the first that it does not
    ("mmproj", V + "block_count", 1024, 1025),
    ("mmproj", V + "image_size", 8192, 8193),
    ("mmproj", V + "patch_size", 1024, 1025),
    ("mmproj", V + "attention.head_count", 4096, 4097),
    ("model", L + "block_count", 512, 513),
    ("model", L + "context_length", 2**28, 2**28 + 1),
    ("model", L + "expert_count", 1024, 1025),
]


@pytest.mark.parametrize(("which", "key", "last", "first"), LIMITS)
def test_numbers_on_both_sides_of_their_limits(
    make: Callable[..., Path], which: str, key: str, last: int, first: int
) -> None:
    """The last number within is refused for something else, if at all: this file has not the tensors for it."""
    check = check_mmproj if which == "mmproj" else check_language
    with pytest.raises(ModelFileError, match=rf"expected {key} in \d+\.\.{last}, got {first}"):
        check(make(which, {key: value(U32, first)}), memory=False)
    said = ""
    try:
        check(make(which, {key: value(U32, last)}), memory=False)
    except ModelFileError as err:
        said = str(err)
    assert f"expected {key} in" not in said
