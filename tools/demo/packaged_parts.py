"""What the packaged model's GGUF files hold, as the parts of a checkpoint: tokenizer, embedding table, image side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

UNKNOWN, START, END, IMAGE = 0, 1, 2, 5  #: tokens
#: Name of a tensor of the image side -> its name in a LLaVA checkpoint; a layer's are below.
_IMAGE_SIDE: Final = {
    "v.class_embd": "model.vision_tower.embeddings.class_embedding",
    "v.patch_embd.weight": "model.vision_tower.embeddings.patch_embedding.weight",
    "v.position_embd.weight": "model.vision_tower.embeddings.position_embedding.weight",
    "v.pre_ln": "model.vision_tower.pre_layrnorm",  # so spelled in transformers
    "mm.0": "model.multi_modal_projector.linear_1",
    "mm.2": "model.multi_modal_projector.linear_2",
}
_LAYER: Final = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj", "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}  # fmt: skip
_IN_A_LAYER: Final = re.compile(r"v\.blk\.(\d+)\.(\w+)")


def _checkpoint_name(name: str) -> str:
    """The name of a tensor of the image side in a checkpoint.

    Example:
        >>> _checkpoint_name("v.blk.2.attn_q.bias")
        'model.vision_tower.encoder.layers.2.self_attn.q_proj.bias'
        >>> _checkpoint_name("mm.0.weight")
        'model.multi_modal_projector.linear_1.weight'
    """
    if name in _IMAGE_SIDE:
        return _IMAGE_SIDE[name]
    part, _, kind = name.rpartition(".")
    if found := _IN_A_LAYER.fullmatch(part):
        return f"model.vision_tower.encoder.layers.{found[1]}.{_LAYER[found[2]]}.{kind}"
    return f"{_IMAGE_SIDE[part]}.{kind}"


class Packaged:
    """The packaged model, read."""

    def __init__(self) -> None:
        import gguf

        import qap_gguf

        files = qap_gguf.packaged_model()
        self._reader, self._images = gguf.GGUFReader(files.model), gguf.GGUFReader(files.mmproj)
        self._dequantize: Any = gguf.quants.dequantize

    def _field(self, name: str) -> Any:
        return self._reader.fields[f"tokenizer.{name}"].contents()

    def embeddings(self) -> NDArray[np.float32]:
        """The language model's table, float32 (words, 256)."""
        table = next(tensor for tensor in self._reader.tensors if tensor.name == "token_embd.weight")
        return np.array(self._dequantize(table.data, table.tensor_type), np.float32)

    def image_side(self) -> dict[str, NDArray[np.generic]]:
        """Tower and projector under the names of a LLaVA checkpoint, float16 or float32 as they lie in the file."""
        return {_checkpoint_name(tensor.name): np.array(tensor.data) for tensor in self._images.tensors}

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json and the files beside it, for transformers and `qap-gguf convert`."""
        words, kinds = self._field("ggml.tokens"), self._field("ggml.token_type")
        special = [(i, word) for i, (word, kind) in enumerate(zip(words, kinds, strict=True)) if kind == 3]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "added_tokens": [{"id": i, "content": word, **flags} for i, word in special],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": {word: i for i, word in enumerate(words)},
                "merges": [merge.split(" ", 1) for merge in self._field("ggml.merges")],
            },
        }  # fmt: skip
        names = {
            "bos_token": words[START],
            "eos_token": words[END],
            "pad_token": words[END],
            "unk_token": words[UNKNOWN],
        }
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **names}
        ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
        for name, content in (
            ("tokenizer.json", tokenizer), ("tokenizer_config.json", settings), ("generation_config.json", ends),
        ):  # fmt: skip
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self._field("chat_template"), encoding="utf-8")
