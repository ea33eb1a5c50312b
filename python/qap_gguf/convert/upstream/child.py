"""Runs llama.cpp's converter in a process of its own: python upstream_child.py FOLDER PRE RUN...

Each RUN is the list of one run's arguments as JSON; one process serves both files, for importing torch takes longer
than most conversions. `qap-run N` goes to stderr before run N, from 0.
FOLDER holds convert_hf_to_gguf.py. PRE is llama.cpp's name of the pre-tokenizer as bpe.py read it from tokenizer.json,
or "" where it could not. The converter knows tokenizers by a hash of some ids, so it refuses one whose vocabulary was
changed or trained anew; then PRE is taken, which was found from what the tokenizer does.
What it does wrongly is fixed (`fix`). This file is run by its path and imports nothing of this package.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Item = tuple[str, Callable[[], Any]]
_VISION = ("vision_tower.", "multi_modal_projector.")
#: architectures by the names that transformers 5 writes -> module and class of the converter, which has older names
RENAMED = {"LightOnOcrForConditionalGeneration": ("lighton_ocr", "LightOnOCRVisionModel")}


def vision_name(name: str, *, tower: bool) -> str:
    """The name by which the converter knows a vision tensor, whatever version of transformers saved it.

    Args:
        name: in the checkpoint.
        tower: put back the `vision_model.` that transformers 5 leaves out of a SigLIP.

    Example:
        >>> vision_name("model.vision_tower.post_layernorm.bias", tower=True)
        'vision_tower.vision_model.post_layernorm.bias'
    """
    short = name.removeprefix("model.")
    if not short.startswith(_VISION):
        return name
    if tower and short.startswith("vision_tower.") and not short.startswith("vision_tower.vision_model."):
        short = short.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return short


def granite_name(name: str) -> str:
    """The same for Granite 4 vision.

    Example:
        >>> granite_name("model.vision_tower.head.probe")
        'model.vision_tower.vision_model.head.probe'
    """
    short = vision_name(name, tower=True)
    return f"model.{short}" if short != name else name


def unified_name(name: str) -> str:
    """The name by which the converter knows a tensor of Gemma 4's encoder without a tower.

    Example:
        >>> unified_name("model.embed_vision.patch_dense.bias")
        'model.vision_embedder.patch_dense.bias'
        >>> unified_name("model.embed_vision.multimodal_embedder.embedding_projection.weight")
        'model.embed_vision.embedding_projection.weight'
    """
    front, projection = "model.embed_vision.", "multimodal_embedder."
    own = name.removeprefix(front)
    if own == name or own.startswith("embedding_projection."):
        return name
    return front + own.removeprefix(projection) if own.startswith(projection) else f"model.vision_embedder.{own}"


def kimi_name(name: str) -> str:
    """The name by which the converter knows a tensor of Kimi-K2.5's tower and projector, as transformers 5 saves it.

    Example:
        >>> kimi_name("model.mm_projector.pre_norm.weight"), kimi_name("vision_tower.encoder.patch_embed.proj.bias")
        ('mm_projector.pre_norm.weight', 'vision_tower.patch_embed.proj.bias')
    """
    return name.removeprefix("model.").replace("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed.")


def paddle_name(name: str) -> str:
    """The name by which the converter knows a tensor of PaddleOCR-VL, whatever version of transformers saved it.

    Example:
        >>> paddle_name("model.projector.linear_1.bias"), paddle_name("model.layers.0.mlp.up_proj.weight")
        ('mlp_AR.linear_1.bias', 'model.layers.0.mlp.up_proj.weight')
    """
    for new, old in (("model.visual.", "visual."), ("model.projector.", "mlp_AR.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def fix(family: Callable[[str], Any]) -> None:
    """Put right what the converter of llama.cpp 0c1e570 does wrongly (docs/upstream.md); `family` gives its modules.

    Gemma 3, LFM2-VL, Granite 4: names without `vision_model.` are refused. Gemma 4 without a tower: names of the
    classes in memory are, too, and a config that says nothing of experts. InternVL: names without `model.` in front
    are dropped in silence. Pixtral, Mistral 3, Qwen2-VL, Qwen2.5-VL: names with it are, and so is [IMG_BREAK], whose
    row is looked for after a filter that takes it away. Llama 4: the second norm gets the name of another norm, which
    Gemma 4 claims, and the most tiles are not stored. PaddleOCR-VL: the names of transformers' classes are dropped
    (projector) or refused (tower). Qwen3.5: checkpoints without layers that predict further tokens, as transformers
    saves them, fail an assertion, or make a file that says it has some.
    """
    for module, name in (("gemma", "Gemma3VisionModel"), ("lfm2", "LFM2VLModel")):
        rename_tensors(getattr(family(module), name), lambda name: vision_name(name, tower=True))
    rename_tensors(
        family("internvl").InternVisionModel, lambda name: f"model.{name}" if name.startswith(_VISION) else name
    )
    rename_tensors(
        family("qwenvl").Qwen2VLVisionModel,
        lambda name: name.removeprefix("model.") if name.startswith("model.visual.") else name,
    )
    rename_tensors(family("granite").Granite4VisionMmprojModel, granite_name)
    rename_tensors(family("gemma").Gemma4UnifiedVisionAudioModel, unified_name)
    rename_tensors(family("kimivl").KimiK25Model, kimi_name)
    rename_tensors(family("ernie").PaddleOCRVisionModel, paddle_name)
    llava = family("llava").LlavaVisionModel
    rename_tensors(llava, lambda name: vision_name(name, tower=False))
    known = llava.filter_tensors.__func__

    def with_break_row(cls: Any, item: Item) -> Item | None:
        if cls.use_break_tok and item[0].endswith("embed_tokens.weight"):
            return item
        found: Item | None = known(cls, item)
        return found

    llava.filter_tensors = classmethod(with_break_row)

    unified = family("gemma").Gemma4UnifiedModel
    set_parameters = unified.set_gguf_parameters

    def set_gguf_parameters(model: Any) -> None:
        model.hparams.setdefault("moe_intermediate_size", None)
        set_parameters(model)

    unified.set_gguf_parameters = set_gguf_parameters

    llama4 = family("llama4").Llama4VisionModel
    map_name = llama4.map_tensor_name

    def map_tensor_name(model: Any, name: str, *words: Any) -> str:
        mapped = str(map_name(model, name, *words))
        return mapped.replace(".attn_post_norm.", ".ln2.")

    llama4.map_tensor_name = map_tensor_name
    llama4_parameters = llama4.set_gguf_parameters

    def with_most_tiles(model: Any) -> None:
        llama4_parameters(model)
        most = model.preprocessor_config.get("max_patches")
        if isinstance(most, int) and 1 <= most <= 256:  # the gate takes no more
            model.gguf_writer.add_vision_preproc_max_tiles(most)

    llama4.set_gguf_parameters = with_most_tiles

    qwen = family("qwen")._QwenMtpMixin
    index = qwen.index_tensors

    def index_tensors(model: Any, *words: Any, **named: Any) -> Any:
        found = index(model, *words, **named)
        model.no_mtp = model.no_mtp or type(model).opt_num_mtp_layers == 0
        return found

    qwen.index_tensors = index_tensors


def rename_models(conversion: Any, family: Callable[[str], Any]) -> None:
    """Let the converter (its package `conversion`; `family` gives its modules) know the architectures of RENAMED."""
    for name, (module, known) in RENAMED.items():
        conversion.MMPROJ_MODEL_MAP[name] = module
        conversion.ModelBase.register(name)(getattr(family(module), known))


def rename_tensors(cls: Any, rename: Callable[[str], str]) -> None:
    """Give the class its tensors under other names."""
    known = cls.filter_tensors.__func__

    def renamed(own: Any, item: Item) -> Item | None:
        found: Item | None = known(own, (rename(item[0]), item[1]))
        return found

    cls.filter_tensors = classmethod(renamed)


def main(folder: str, pre: str, *runs: str) -> None:
    print("qap-run 0", file=sys.stderr, flush=True)  # before the long import: the caller hears that something happens
    # The first place is this file's own folder, whose modules are not meant.
    sys.path[0] = folder
    sys.path.insert(1, str(Path(folder) / "gguf-py"))
    base: Any = importlib.import_module("conversion.base")
    known = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(model: Any, tokenizer: Any) -> str:
        try:
            return str(known(model, tokenizer))
        except NotImplementedError:
            if not pre:
                raise
            return pre

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre
    conversion: Any = importlib.import_module("conversion")

    def family(module: str) -> Any:
        return importlib.import_module(f"conversion.{module}")

    fix(family)
    rename_models(conversion, family)
    script = Path(folder) / "convert_hf_to_gguf.py"
    for number, arguments in enumerate(runs):
        if number:
            print(f"qap-run {number}", file=sys.stderr, flush=True)
        sys.argv = [script.name, *json.loads(arguments)]
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
