"""Tiny mmproj files with random weights, one for each projector that the gate has complete rules for.

They answer nothing; they load and run, which is what damage is tested with. Their tokens are 256 wide, as the packaged
language model's. Tensor names and shapes: tools/mtmd/clip.cpp and models/*.cpp of llama.cpp 0c1e570.
"""

from __future__ import annotations

import random
import struct
from typing import Any

from gguf_mutations import ARRAY, STRING, Key, Tensor, n_bytes, write

F32, F16 = 0, 1
U32_KEY, I32_KEY, F32_KEY, BOOL_KEY = 4, 5, 6, 7
N, HEADS, FF, LAYERS, PATCH, WIDTH = 64, 4, 96, 2, 8, 256
#: projector -> pixels of a side
PROJECTORS = dict.fromkeys(
    ("idefics3", "gemma3", "internvl", "qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "glm4v", "exaone4_5",
     "paddleocr", "kimivl", "kimik25", "hunyuanvl", "pixtral", "lfm2", "llama4", "gemma4v", "gemma4uv", "minicpmv4_6",
     "granite4_vision", "lightonocr", "janus_pro"), 64,
)  # fmt: skip
#: towers that attend in windows
WINDOWS = ("qwen2.5vl_merger", "exaone4_5")
_FRAMES = ("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "glm4v", "exaone4_5")  # two filters
_NO_BIAS = ("qwen2vl_merger", "qwen2.5vl_merger", "exaone4_5")  # of the filters
#: places of their tables, whatever the picture's size
_PLACES = {"gemma4v": [2 * 1120, 2], "gemma4uv": [1120, 2], "minicpmv4_6": [70 * 70], "kimik25": [8, 8]}
_NO_TABLE = ("qwen2vl_merger", "qwen2.5vl_merger", "exaone4_5", "pixtral", "lightonocr")  # of positions
_CLASS = ("internvl", "llama4")
_FUSED = ("internvl", "qwen3vl_merger", "glm4v", "exaone4_5")  # attn_qkv
_GATED = ("qwen2.5vl_merger", "exaone4_5", "glm4v")
_SCALED = (  # projector.scale_factor
    "idefics3", "gemma3", "internvl", "kimivl", "kimik25", "lfm2", "llama4", "gemma4v", "gemma4uv",
)  # fmt: skip
_LIMITED = ("paddleocr", "exaone4_5", "hunyuanvl")  # the file says how many pixels a picture has


def _key(name: str, kind: int, what: Any) -> Key:
    if isinstance(what, str):
        return Key(name.encode(), STRING, struct.pack("<Q", len(what)) + what.encode(), 0)
    code = {U32_KEY: "I", I32_KEY: "i", F32_KEY: "f", BOOL_KEY: "?"}[kind]
    if isinstance(what, list):
        return Key(name.encode(), ARRAY, struct.pack(f"<IQ{len(what)}{code}", kind, len(what), *what), 0)
    return Key(name.encode(), kind, struct.pack("<" + code, what), 0)


def _numbers(rng: random.Random, count: int, kind: int, centre: float) -> bytes:
    code = "e" if kind == F16 else "f"
    some = [centre + rng.uniform(-0.1, 0.1) for _ in range(min(count, 997))]
    return struct.pack(f"<{count}{code}", *(some[i % len(some)] for i in range(count)))


def _linear(name: str, n_in: int, n_out: int) -> list[tuple[str, list[int], int]]:
    return [(f"{name}.weight", [n_in, n_out], F16), (f"{name}.bias", [n_out], F32)]


def _norm(name: str, n: int) -> list[tuple[str, list[int], int]]:
    return [(f"{name}.weight", [n], F32), (f"{name}.bias", [n], F32)]


def _table(projector: str, side: int) -> list[tuple[str, list[int], int]]:
    n_side = side // PATCH
    sides = _PLACES.get(projector, [n_side**2 + (projector in _CLASS)])
    return [] if projector in _NO_TABLE else [("v.position_embd.weight", [N, *sides], F32)]


def _tower(projector: str, side: int) -> list[tuple[str, list[int], int]]:
    if projector == "gemma4uv":
        n_pixels = 3 * (2 * PATCH) ** 2
        norms = [*_norm("v.patch_norm.1", n_pixels), *_norm("v.patch_norm.2", N), *_norm("v.patch_norm.3", N)]
        return [*_linear("v.patch_embd", n_pixels, N), *norms, *_table(projector, side)]
    weight = [3 * PATCH * PATCH, N] if projector == "llama4" else [PATCH, PATCH, 3, N]
    rows = [("v.patch_embd.weight", weight, F16)]
    if projector in _FRAMES:
        rows += [("v.patch_embd.weight.1", [PATCH, PATCH, 3, N], F16)]
    if projector not in _NO_BIAS:
        rows += [("v.patch_embd.bias", [N], F32)]
    rows += _table(projector, side)
    if projector in _CLASS:
        rows += [("v.class_embd", [N], F32)]
    rows += _norm("v.post_ln", N)
    for i in range(LAYERS):
        block = f"v.blk.{i}."
        if projector in _FUSED:
            rows += _linear(block + "attn_qkv", N, 2 * N if projector == "exaone4_5" else 3 * N)
        else:
            rows += [row for part in "qkv" for row in _linear(f"{block}attn_{part}", N, N)]
        if projector == "internvl":
            rows += [(block + "ls1.weight", [N], F32), (block + "ls2.weight", [N], F32)]
        if projector in ("glm4v", "gemma4v"):
            rows += [(f"{block}attn_{part}_norm.weight", [N // HEADS], F32) for part in "qk"]
        if projector in _GATED:
            rows += _linear(block + "ffn_gate", N, FF)
        rows += _linear(block + "attn_out", N, N) + _norm(block + "ln1", N) + _norm(block + "ln2", N)
        rows += _linear(block + "ffn_up", N, FF) + _linear(block + "ffn_down", FF, N)
    return rows


def _vit_merger() -> list[tuple[str, list[int], int]]:
    """Between the first two blocks of MiniCPM-V 4.6."""
    part = "v.vit_merger."
    rows = _norm(part + "ln1", N) + _norm(part + "ds_ln", 4 * N)
    rows += [row for name in ("q", "k", "v", "out") for row in _linear(f"{part}attn_{name}", N, N)]
    return rows + _linear(part + "ds_ffn_up", 4 * N, 80) + _linear(part + "ds_ffn_down", 80, N)


def window_projector(number: int) -> list[tuple[str, list[int], int]]:
    """One projector of Granite 4 vision, for windows of 4 x 4 patches and 2 x 2 queries."""
    part = f"v.proj_blk.{number}."
    rows = [(part + "img_pos", [N, 16], F32), (part + "query", [N, 4], F32)]
    norms = ("norm", "post_norm", "self_attn_norm", "cross_attn_norm", "ffn_norm")
    rows += [row for name in norms for row in _norm(part + name, N)]
    attentions = [f"{kind}_attn_{name}" for kind in ("self", "cross") for name in ("q", "k", "v", "out")]
    rows += [row for name in attentions for row in _linear(part + name, N, N)]
    rows += _linear(part + "ffn_up", N, FF) + _linear(part + "ffn_down", FF, N)
    return rows + _linear(part + "linear", N, WIDTH)


def _projector(projector: str) -> list[tuple[str, list[int], int]]:
    mlp = "mm.model.mlp."
    merged = _linear("mm.1", 4 * N, 80) + _linear("mm.2", 80, WIDTH)
    merger = [("mm.patch_merger.weight", [2, 2, N, 80], F16), ("mm.patch_merger.bias", [80], F32)]
    ends = [(name, [WIDTH], F32) for name in ("mm.image_begin", "mm.image_end", "mm.post_norm.weight")]
    edged = [("mm.input_norm.weight", [N], F32), ("mm.patch_merger.weight", [4 * N, N], F16)]
    edged += _linear("mm.1", N, 80) + _linear("mm.2", 80, WIDTH)
    return {
        "idefics3": [("mm.model.fc.weight", [N * 4, WIDTH], F16)],
        "gemma3": [("mm.input_projection.weight", [WIDTH, N], F16), ("mm.soft_emb_norm.weight", [N], F32)],
        "internvl": _norm(mlp + "0", 4 * N) + _linear(mlp + "1", 4 * N, 80) + _linear(mlp + "3", 80, WIDTH),
        "llama4": [
            (mlp + "1.weight", [4 * N, 80], F16), (mlp + "2.weight", [80, 72], F16),
            ("mm.model.fc.weight", [72, WIDTH], F16),
        ],
        "glm4v": [
            *merger, ("mm.model.fc.weight", [80, 72], F16), *_norm("mm.post_norm", 72),
            *_linear("mm.up", 72, FF), *_linear("mm.gate", 72, FF), *_linear("mm.down", FF, WIDTH),
        ],
        "hunyuanvl": [
            ("mm.pre_norm.weight", [N], F32), ("mm.0.weight", [2, 2, N, 80], F16), ("mm.0.bias", [80], F32),
            ("mm.2.weight", [1, 1, 80, FF], F16), ("mm.2.bias", [FF], F32), ("v.image_newline", [FF], F32),
            *_linear("mm.model.fc", FF, WIDTH), *ends,
        ],
        "pixtral": [*edged, ("v.token_embd.img_break", [WIDTH], F32)],
        "lightonocr": edged,
        "janus_pro": _linear("mm.0", N, 80) + _linear("mm.1", 80, WIDTH),
        "lfm2": _norm("mm.input_norm", 4 * N) + merged,
        "gemma4v": [
            ("mm.input_projection.weight", [N, WIDTH], F16), ("v.std_bias", [N], F32), ("v.std_scale", [N], F32),
        ],
        "gemma4uv": [("mm.input_projection.weight", [N, WIDTH], F16)],
        "minicpmv4_6": [
            *_vit_merger(), *_norm("mm.input_norm", 4 * N),
            *_linear("mm.up", 4 * N, 80), *_linear("mm.down", 80, WIDTH),
        ],
        "granite4_vision": [("v.image_newline", [WIDTH], F32), *window_projector(0)],
        **dict.fromkeys(("paddleocr", "kimivl", "kimik25"), _norm("mm.input_norm", N) + merged),
    }.get(projector, _linear("mm.0", 4 * N, 4 * N) + _linear("mm.2", 4 * N, WIDTH))  # fmt: skip


def _own_keys(projector: str, side: int) -> list[Key]:
    own = {
        "n_wa_pattern": (projector in WINDOWS, 2),
        "projector.scale_factor": (projector in _SCALED, 2),
        "preproc_image_size": (projector == "idefics3", 2 * side),
        "spatial_merge_size": (projector in ("pixtral", "lightonocr"), 2),
        "projector.window_side": (projector == "granite4_vision", 4),
        "projector.query_side": (projector == "granite4_vision", 2),
        "attention.head_count_kv": (projector == "exaone4_5", HEADS // 2),
        "image_min_pixels": (projector in _LIMITED, 4 * 4 * PATCH * PATCH),
        "image_max_pixels": (projector in _LIMITED, 256 * 4 * PATCH * PATCH),
    }
    keys = [_key(f"clip.vision.{name}", U32_KEY, number) for name, (there, number) in own.items() if there]
    if projector == "minicpmv4_6":
        keys += [_key("clip.vision.wa_layer_indexes", I32_KEY, [0])]
    if projector == "granite4_vision":
        lists = {"feature_layer": [1], "projector.spatial_offsets": [-1]}
        lists["image_grid_pinpoints"] = [side, side, 2 * side, side, side, 2 * side]
        keys += [_key(f"clip.vision.{name}", I32_KEY, numbers) for name, numbers in lists.items()]
    return keys


def tiny_mmproj(projector: str, seed: int = 0, *, side: int | None = None) -> bytes:
    """A file of that projector, for pictures of `side` pixels; the same seed gives the same bytes."""
    rng = random.Random(f"{projector}/{seed}")
    side = PROJECTORS[projector] if side is None else side
    keys = _tower_keys(projector, side) + _own_keys(projector, side)
    return write(keys, _filled(rng, _tower(projector, side) + _projector(projector)))


def _tower_keys(projector: str, side: int) -> list[Key]:
    """What every file says."""
    v = "clip.vision."
    return [
        _key("general.architecture", STRING, "clip"),
        _key("clip.has_vision_encoder", BOOL_KEY, True),
        _key("clip.projector_type", STRING, projector),
        _key("clip.use_gelu", BOOL_KEY, projector not in _GATED and projector != "qwen2vl_merger"),
        _key("clip.use_silu", BOOL_KEY, projector in _GATED),
        *[
            _key(v + name, U32_KEY, n)
            for name, n in {
                "image_size": side, "patch_size": PATCH, "embedding_length": N, "feed_forward_length": FF,
                "projection_dim": WIDTH, "block_count": 0 if projector == "gemma4uv" else LAYERS,
                "attention.head_count": HEADS,
            }.items()
        ],
        _key(v + "attention.layer_norm_epsilon", F32_KEY, 1e-6),
        _key(v + "image_mean", F32_KEY, [0.5, 0.5, 0.5]),
        _key(v + "image_std", F32_KEY, [0.5, 0.5, 0.5]),
    ]  # fmt: skip


#: families that were not compared with their originals, and the side of their pictures, in pixels and in tokens
UNCOMPARED = {
    "dots_ocr": (64, 4), "youtuvl": (64, 4), "cogvlm": (64, 8), "adapter": (64, 4), "gemma3nv": (256, 16),
    "glm5v": (64, 4),
}  # fmt: skip
#: whose towers theirs are like; the others: pixtral
_TOWERS = {"cogvlm": "internvl", "glm5v": "glm4v"}


def _uncompared(projector: str, n_patches: int) -> tuple[list[Key], list[tuple[str, list[int], int]]]:
    """Keys and tensors of its own, beside those of every tower."""
    v, mlp = "clip.vision.", _linear("mm.0", 4 * N, 80) + _linear("mm.2", 80, WIDTH)
    bounds = [_key(v + "image_min_pixels", U32_KEY, 1024), _key(v + "image_max_pixels", U32_KEY, 65536)]
    table = ("v.position_embd.weight", [N, n_patches], F32)
    return {
        "dots_ocr": (
            [_key(v + "projector.scale_factor", U32_KEY, 2), *bounds],
            [*_norm("mm.input_norm", N), ("mm.post_norm.weight", [N], F32), *mlp],
        ),
        "youtuvl": (
            [_key(v + "window_size", U32_KEY, 32), _key(v + "wa_layer_indexes", I32_KEY, [1])],
            [("mm.input_norm.weight", [N], F32), *mlp],
        ),
        "cogvlm": (
            [],
            [
                ("v.position_embd.weight", [N, n_patches + 1], F32), ("v.class_embd", [N], F32),
                ("v.boi", [WIDTH], F32), ("v.eoi", [WIDTH], F32), ("mm.model.fc.weight", [N, 80], F16),
                *_norm("mm.post_fc_norm", 80), ("mm.up.weight", [80, FF], F16), ("mm.gate.weight", [80, FF], F16),
                ("mm.down.weight", [FF, WIDTH], F16),
            ],
        ),
        "glm5v": ([_key(v + "swiglu_clamp", F32_KEY, 10.0), *bounds], _projector("glm4v")),
        "adapter": (
            [],
            [
                table, ("adapter.conv.weight", [2, 2, N, 80], F16), ("adapter.conv.bias", [80], F32),
                ("adapter.linear.linear.weight", [80, 80], F16), *_norm("adapter.linear.norm1", 80),
                ("adapter.linear.dense_h_to_4h.weight", [80, FF], F16), ("adapter.linear.gate.weight", [80, FF], F16),
                ("adapter.linear.dense_4h_to_h.weight", [FF, WIDTH], F16), ("adapter.boi", [WIDTH], F32),
                ("adapter.eoi", [WIDTH], F32),
            ],
        ),
    }[projector]  # fmt: skip


def _tiny_convolutions(rng: random.Random, side: int) -> bytes:
    """Gemma 3n: a stem, a block, the average of 4 x 4 places, and one product; rows as wide as the language model's."""
    own = {"embedding_length": WIDTH, "patch_size": side // 256, "block_count": LAYERS}
    keys = [key for key in _tower_keys("gemma3nv", side) if key.name.decode().removeprefix("clip.vision.") not in own]
    keys += [_key(f"clip.vision.{name}", U32_KEY, number) for name, number in own.items()]
    rows = [
        ("v.conv_stem.conv.weight", [3, 3, 3, 8], F16), ("v.blk.0.0.conv_exp.weight", [3, 3, 8, 16], F16),
        ("v.blk.0.0.conv_pwl.weight", [1, 1, 16, WIDTH], F16), ("mm.input_projection.weight", [WIDTH, WIDTH], F16),
        ("mm.soft_emb_norm.weight", [WIDTH], F32),
    ]  # fmt: skip
    return write(keys, _filled(rng, rows))


def tiny_uncompared(projector: str, seed: int = 0, *, side: int | None = None) -> bytes:
    """A file of a family that was not compared with its original, for pictures of `side` pixels."""
    rng, side = random.Random(f"{projector}/{seed}"), side or UNCOMPARED[projector][0]
    if projector == "gemma3nv":
        return _tiny_convolutions(rng, side)
    keys, rows = _uncompared(projector, (side // PATCH) ** 2)
    tower = [row for row in _tower(_TOWERS.get(projector, "pixtral"), side) if ".ls" not in row[0]]
    linear = {"v.patch_embd.weight": [3 * PATCH**2, N]} if projector == "youtuvl" else {}
    own = {name for name, _, _ in rows}
    tower = [(name, linear.get(name, dims), kind) for name, dims, kind in tower if name not in own]
    return write([*_tower_keys(projector, side), *keys], _filled(rng, [*tower, *rows]))


def tiny_resampler(seed: int = 0) -> bytes:
    """A MiniCPM-V file: eight queries over all patches, which cannot be pruned."""
    rng = random.Random(f"resampler/{seed}")
    v, r = "clip.vision.", "resampler."
    keys = [
        _key("general.architecture", STRING, "clip"),
        _key("clip.has_vision_encoder", BOOL_KEY, True),
        _key("clip.projector_type", STRING, "resampler"),
        _key("clip.use_gelu", BOOL_KEY, True),
        _key("clip.minicpmv_version", I32_KEY, 3),
        _key("clip.minicpmv_query_num", U32_KEY, 8),
        *[
            _key(v + name, U32_KEY, n)
            for name, n in {
                "image_size": 64, "patch_size": PATCH, "embedding_length": N, "feed_forward_length": FF,
                "projection_dim": 0, "block_count": LAYERS, "attention.head_count": HEADS,
            }.items()
        ],
        _key(v + "attention.layer_norm_epsilon", F32_KEY, 1e-6),
        _key(v + "image_mean", F32_KEY, [0.5, 0.5, 0.5]),
        _key(v + "image_std", F32_KEY, [0.5, 0.5, 0.5]),
    ]  # fmt: skip
    rows = [row for row in _tower("resampler", 64) if row[0] != "v.position_embd.weight"]
    rows += [("v.position_embd.weight", [N, 70 * 70], F32)]
    rows += [(r + "query", [WIDTH, 8], F32), (r + "pos_embed_k", [WIDTH, 8], F32)]
    rows += [(r + "proj.weight", [WIDTH, WIDTH], F16), (r + "kv.weight", [N, WIDTH], F16)]
    rows += [row for part in ("q", "k", "v", "out") for row in _linear(f"{r}attn.{part}", WIDTH, WIDTH)]
    rows += [row for part in ("q", "kv", "post") for row in _norm(f"{r}ln_{part}", WIDTH)]
    return write(keys, _filled(rng, rows))


def _filled(rng: random.Random, rows: list[tuple[str, list[int], int]]) -> list[Tensor]:
    """Tensors of these names, sizes and types, with numbers around 1 for the weights of norms and 0 for others."""
    tensors = []
    for name, dims, kind in rows:
        centre = 1.0 if "ln" in name and name.endswith("weight") else 0.0
        count = n_bytes(dims, kind) // (2 if kind == F16 else 4)
        tensors.append(Tensor(name.encode(), dims, kind, _numbers(rng, count, kind, centre), 0))
    return tensors


def tiny_tower(seed: int = 0) -> bytes:
    """A LLaVA file in name only, with CLIP's text tower (the keys and tensors ``qap_clip_text.*``)."""
    rng = random.Random(f"tower/{seed}")
    n, ff, n_ctx, hidden, proj = 16, 24, 10, 16, 12
    tokens = ["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    p = "qap_clip_text."
    counts = {
        "version": 1, "block_count": 2, "attention.head_count": 2, "embedding_length": n, "feed_forward_length": ff,
        "context_length": n_ctx, "projection_length": proj, "vocab_size": len(tokens), "eos_token_id": 6,
        "vision.embedding_length": hidden, "tokenizer.bos_token_id": 5, "tokenizer.eos_token_id": 6,
        "tokenizer.unknown_token_id": 6,
    }  # fmt: skip
    keys = [_key("general.architecture", STRING, "clip"), _key("clip.projector_type", STRING, "mlp")]
    keys += [_key(p + name, U32_KEY, count) for name, count in counts.items()]
    keys += [_key(p + name, F32_KEY, 1e-5) for name in ("attention.layer_norm_epsilon", "vision.layer_norm_epsilon")]
    keys += [_key(p + "activation", STRING, "quick_gelu"), _key(p + "tokenizer.special_token_ids", I32_KEY, [5, 6])]
    for name, texts in {"tokenizer.tokens": tokens, "tokenizer.merges": ["a b</w>"]}.items():
        items = b"".join(struct.pack("<Q", len(text)) + text.encode() for text in texts)
        keys.append(Key((p + name).encode(), ARRAY, struct.pack("<IQ", STRING, len(texts)) + items, 0))
    rows = [("token_embd.weight", [n, len(tokens)], F16), ("position_embd.weight", [n, n_ctx], F32)]
    for i in range(2):
        block = f"blk.{i}."
        rows += _norm(block + "ln1", n) + _norm(block + "ln2", n)
        rows += [row for part in ("q", "k", "v", "out") for row in _linear(f"{block}attn_{part}", n, n)]
        rows += _linear(block + "ffn_up", n, ff) + _linear(block + "ffn_down", ff, n)
    rows += _norm("final_ln", n) + _norm("post_ln", hidden)
    rows += [("text_proj.weight", [n, proj], F16), ("visual_proj.weight", [hidden, proj], F16)]
    return write(keys, _filled(rng, [(p + name, dims, kind) for name, dims, kind in rows]))
