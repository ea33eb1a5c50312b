"""What transformers makes of a picture: features and logits, from pixels that need no resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

Array = npt.NDArray[Any]

#: families whose language model has M-RoPE
MROPE = ("qwen", "mimo", "glm", "paddleocr", "hunyuan", "minicpm")
#: families whose towers stand the patches of a token one after another
CONSECUTIVE = ("qwen", "mimo", "glm", "exaone")
#: families whose towers attend in windows
WINDOWS = ("qwen2.5-vl", "mimo-vl", "exaone-4.5")


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
    if name.startswith("gemma-4"):
        vision = model.config.vision_config
        size = vision.patch_size if name == "gemma-4" else vision.model_patch_size
        lines, columns = height // size, width // size
        x = pixels.reshape(3, lines, size, columns, size).permute(1, 3, 2, 4, 0).reshape(1, lines * columns, -1)
        line, column = torch.meshgrid(torch.arange(lines), torch.arange(columns), indexing="ij")
        return {"pixel_values": x, "image_position_ids": torch.stack([column, line], -1).reshape(1, -1, 2)}
    if name == "minicpm-v-4.6":
        size = model.config.vision_config.patch_size
        patches = pixels.reshape(3, height // size, size, width // size, size).permute(0, 2, 1, 3, 4)
        sizes = torch.tensor([[height // size, width // size]], dtype=torch.int32)
        return {"pixel_values": patches.reshape(1, 3, size, -1), "target_sizes": sizes}
    if name == "granite-4":  # a picture of one tile: as overview and as the only tile of a grid
        return {"pixel_values": torch.stack([pixels, pixels])[None], "image_sizes": torch.tensor([[height, width]])}
    if name.startswith(CONSECUTIVE):
        values, grid = flatten_qwen(pixels, model.config.vision_config.patch_size)
        return {"pixel_values": values, "image_grid_thw": grid}
    if name.startswith(("paddleocr", "hunyuan", "kimi")):
        size = model.config.vision_config.patch_size
        lines, columns = height // size, width // size
        x = pixels.reshape(3, lines, size, columns, size).permute(1, 3, 0, 2, 4).reshape(lines * columns, 3, size, size)
        grid = torch.tensor([[1, lines, columns]])
        return {"pixel_values": x.flatten(1) if name.startswith("hunyuan") else x, "image_grid_thw": grid}
    if name == "smolvlm":
        return {"pixel_values": pixels[None, None]}
    if name in ("pixtral", "mistral-3", "lighton-ocr"):
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
    """Projected rows of one picture, (n_tok, n_embd), DeepStack's planes after the main one."""
    with torch.no_grad():
        if name == "llama-4":  # its projector stands outside
            hidden = model.get_image_features(**inputs(name, model, pixels)).last_hidden_state
            return np.asarray(model.multi_modal_projector(hidden.reshape(-1, hidden.shape[-1])).numpy())
        out = model.model.get_image_features(**inputs(name, model, pixels))
    if name == "granite-4":
        return granite_rows(out.deepstack_features, pixels.shape[1:], model.config.vision_config)
    main = getattr(out, "pooler_output", out)
    planes = getattr(out, "deepstack_features", None)
    if isinstance(main, (list, tuple)):
        main = torch.cat([m.reshape(-1, m.shape[-1]) for m in main])
    main = main.reshape(-1, main.shape[-1])
    if name.startswith("hunyuan"):  # a row in front of the first line, one after each, and one at the end
        length = pixels.shape[2] // model.config.vision_config.patch_size // 2
        main = main[1:-1].reshape(-1, length + 1, main.shape[-1])[:, :-1].reshape(-1, main.shape[-1])
    if planes is not None:
        planes = [torch.cat(list(p)) if isinstance(p, (list, tuple)) else p for p in planes]
        main = torch.cat([main, *planes], dim=-1)
    return np.asarray(main.numpy())


def granite_rows(streams: Any, size: Any, vision: Any) -> Array:
    """A picture of one tile: the projectors' planes by the layers that take them, without the rows of image_newline."""
    planes = [features[0] for _, features in sorted(streams, key=lambda stream: stream[0])]
    rows = torch.cat(planes, dim=-1)
    side = size[0] // vision.patch_size // 2  # downsample_rate
    grid = rows[side * side :].reshape(side, side + 1, -1)
    return np.asarray(torch.cat([rows[: side * side], grid[:, :-1].reshape(side * side, -1)]).numpy())


def logits(
    name: str, model: Any, parts: list[list[int] | Array], places: list[tuple[Array, int] | None] | None = None
) -> Array:
    """Logits after the last token of a prompt.

    Args:
        name: the family.
        model: transformers' model.
        parts: token ids, or rows of an image, (k, n_embd), in the order of the prompt.
        places: for M-RoPE and an image part, the (time, row, column) of each row relative to its start, (k, 3), and by
            how much the position after it is higher; None for text, and for rows that count like text. HunyuanVL's rows
            have (time, column, row, number of the picture), (k, 4); only the first is relative.
    """
    planes = getattr(model.config.vision_config, "deepstack_visual_indexes", None) or []
    width = model.config.get_text_config().hidden_size
    embed = model.get_input_embeddings()
    rows: list[Any] = []
    visual: list[Any] = []
    positions: list[Array] = []
    start = 0
    for part, place in zip(parts, places or [None] * len(parts), strict=True):
        if isinstance(part, list):
            rows.append(embed(torch.tensor(part)))
        else:
            rows.append(torch.tensor(np.ascontiguousarray(part[:, :width])))
            visual.append(torch.tensor(np.ascontiguousarray(part[:, width:])))
        is_image = torch.full((len(part),), not isinstance(part, list))
        positions.append(absolute(name, start, part, place))
        start += len(part) if place is None else place[1]
        rows[-1] = (rows[-1], is_image)
    embeds = torch.cat([row for row, _ in rows])[None]
    mask = torch.cat([is_image for _, is_image in rows])[None]
    more: dict[str, Any] = {}
    if name.startswith(MROPE):
        more["position_ids"] = torch.tensor(np.concatenate(positions).T[:, None])
    if planes:
        stacked = torch.cat(visual)
        more["visual_pos_masks"] = mask
        more["deepstack_visual_embeds"] = list(stacked.split(width, dim=1))
    if name == "gemma-3":
        more["token_type_ids"] = mask.long()
    if name == "gemma-4":
        more["mm_token_type_ids"] = mask.long()
    if name == "gemma-4-unified":
        # as in generate(), and as Gemma 4: forward() alone opens the layers without a window, too
        numbers = torch.arange(embeds.shape[1])[None]
        kinds = {"mm_token_type_ids": mask.long()}
        more["attention_mask"] = model.create_masks_for_generate(model.config, embeds, None, None, numbers, **kinds)
    with torch.no_grad():
        if name == "granite-4":
            return granite_logits(model, embeds, mask, torch.cat([embeds[0, mask[0]], torch.cat(visual)], dim=-1))
        if name.startswith(MROPE):
            hidden = model.model.language_model(inputs_embeds=embeds, **more).last_hidden_state
            out = model.lm_head(hidden)
        elif name == "llama-4":
            out = model.language_model(inputs_embeds=embeds).logits
        else:
            out = model(inputs_embeds=embeds, **more).logits
    return np.asarray(out[0, -1].numpy())


def granite_logits(model: Any, embeds: Any, mask: Any, rows: Any) -> Array:
    """Granite 4's language model adds a picture's planes to zeros, each in front of its layer. rows: (k, planes * n)"""
    streams = sorted(
        [layer for _, layer in model.config.deepstack_layer_map] + list(model.config.spatial_target_layers)
    )
    width = embeds.shape[-1]
    planes = dict(zip(streams, rows.split(width, dim=1), strict=True))
    masked = mask[..., None]
    hidden = model.model.language_model(
        inputs_embeds=embeds.masked_fill(masked, 0.0), vision_mask=masked, deepstack_features=planes
    ).last_hidden_state
    out = model.lm_head(hidden) / model.config.text_config.logits_scaling
    return np.asarray(out[0, -1].numpy())


def absolute(name: str, start: int, part: list[int] | Array, place: tuple[Array, int] | None) -> Array:
    """Positions of a part of a prompt that begins at `start`, (k, axes)."""
    axes = 4 if name.startswith("hunyuan") else 3
    if place is None:
        found = np.repeat(start + np.arange(len(part))[:, None], axes, axis=1)
        if axes == 4 and isinstance(part, list):
            found[:, 3] = 0  # libllama's choice for text, docs/upstream.md; in training as the other axes
        return found
    if axes == 3:
        return np.asarray(start + place[0])
    found = np.array(place[0])
    ends = found[:, 1] < 0  # the first row and the last, which stand for no place
    found[:, 0] += start
    found[ends] = found[ends, :1]
    return found


def hunyuan_places(rows: Array, length: int, lines: int, number: int = 0) -> tuple[Array, int]:
    """What logits() takes for rows of HunyuanVL's picture, of lines of `length` tokens; -1: a row without place."""
    n_rows = lines * (length + 1) + 2
    row, column = np.divmod(rows - 1, length + 1)
    found = np.stack([rows, column, row, np.full_like(rows, number)], 1)
    found[(rows == 0) | (rows == n_rows - 1), 1:] = -1
    return found, n_rows


def as_authors(model: Any) -> Any:
    """HunyuanVL as its authors' code computes it, where transformers 5.24 departs from that.

    Sections of the rotary axes come once for each half of a head; transformers takes sections of twice the size once.
    Learned positions are resized by (n + 0.1) / side; transformers resizes to n.
    """
    rotary, embeddings = model.model.language_model.rotary_emb, model.model.vision_tower.embeddings
    sections = list(rotary.mrope_section)

    def by_section(angles: Any) -> Any:
        parts = torch.cat((angles, angles), dim=-1).split(sections * 2, dim=-1)
        return torch.cat([part[i % len(sections)] for i, part in enumerate(parts)], dim=-1)

    def resized(_hidden: Any, height: Any, width: Any) -> Any:
        side = embeddings.position_edge
        table = embeddings.position_embedding.weight[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((float(height) + 0.1) / side, (float(width) + 0.1) / side)
        found = torch.nn.functional.interpolate(table, scale_factor=scale, mode="bilinear", align_corners=False)
        return found.flatten(2).transpose(1, 2)

    rotary.recomposition_frequencies = by_section
    embeddings.interpolate_pos_encoding = resized
    return model


def tower_of(name: str, model: Any) -> Any:
    """The vision tower, whatever its name."""
    if name == "llama-4":
        return model.vision_model
    names = ("visual", "vision_tower", "vision_encoder", "vision_model")
    return next(getattr(model.model, word) for word in names if getattr(model.model, word, None) is not None)


def attention(name: str, model: Any, pixels: Any) -> tuple[Array | None, Array]:
    """Attention at the last layer of the encoder: of the class token (or None), and received, each (n_tok,).

    Weights come from transformers' eager attention, which is watched while it runs; means over heads (and queries),
    then over the patches of a token.
    """
    import sys

    tower = tower_of(name, model)
    own = {type(m).__module__ for m in tower.modules() if type(m).__module__.startswith("transformers.models")}
    seen: list[Any] = []
    undo = []
    names = ("vision_eager_attention_forward", "eager_attention_forward")
    for module, function in ((sys.modules[found], word) for found in own for word in names):
        real = getattr(module, function, None)
        if real is None:
            continue

        def watched(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            out = _real(*args, **kwargs)
            seen.append(out[1])
            return out

        undo.append((module, function, real))
        setattr(module, function, watched)
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        features(name, model, pixels)
    finally:
        tower.set_attn_implementation(before)
        for module, function, real in undo:
            setattr(module, function, real)
    weights = seen[-1][0].mean(0).numpy()  # (queries, keys)
    cls = {"internvl": 0, "llama-4": len(weights) - 1}.get(name)
    patches = np.delete(np.arange(len(weights)), cls) if cls is not None else np.arange(len(weights))
    of_class = None if cls is None else pool(name, model, pixels, weights[cls][patches])
    return of_class, pool(name, model, pixels, weights.mean(0)[patches])


def pool(name: str, model: Any, pixels: Any, values: Array) -> Array:
    """Means over the patches of each token. values: (n_patches,) in the order of the attention."""
    size = model.config.vision_config.patch_size
    size = size[0] if isinstance(size, (list, tuple)) else size
    _, height, width = pixels.shape
    rows, columns = height // size, width // size
    if name.startswith(CONSECUTIVE):
        means = values.reshape(-1, 4).mean(1)
        if name in WINDOWS:
            means = means[np.argsort(window_order(rows // 2, columns // 2))]
        return np.asarray(means)
    if name == "minicpm-v-4.6":  # the later layers see four patches as one
        rows, columns = rows // 2, columns // 2
    merge = int(np.sqrt(len(values) // MERGED[name](rows, columns)))
    blocks = values.reshape(rows // merge, merge, columns // merge, merge)
    return np.asarray(blocks.mean((1, 3)).reshape(-1))


def window_order(lines: int, columns: int, side: int = 4) -> Array:
    """Numbers of the tokens in the order of windows of side x side tokens, lines and columns first."""
    grid = np.arange(lines * columns).reshape(lines, columns)
    windows = [
        grid[top : top + side, left : left + side].reshape(-1)
        for top in range(0, lines, side)
        for left in range(0, columns, side)
    ]
    return np.concatenate(windows)


def _tokens(side: int) -> Any:
    return lambda rows, columns: rows * columns // side**2


#: family -> tokens of a picture of rows x columns patches
MERGED = {
    "smolvlm": _tokens(2), "gemma-3": _tokens(2), "internvl": _tokens(2), "pixtral": _tokens(1),
    "mistral-3": _tokens(2), "llama-4": _tokens(2), "lfm2-vl": _tokens(2), "paddleocr-vl": _tokens(2),
    "hunyuan-vl": _tokens(2), "kimi-k2.5": _tokens(2),
    "kimi-vl": _tokens(2), "gemma-4": _tokens(3), "minicpm-v-4.6": _tokens(2), "lighton-ocr": _tokens(2),
    "janus-pro": _tokens(1),
}  # fmt: skip
