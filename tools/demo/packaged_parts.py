"""Checkpoints out of a trained part and what the packaged model's GGUF files hold.

That is its tokenizer, its embedding table and its image side. For tiny_checkpoint.py and dino_checkpoint.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from folders import replacing_folder

Tensors = Mapping[str, NDArray[np.generic]]

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
_TABLE: Final = "model.language_model.embed_tokens.weight"


class CheckpointError(Exception):
    """The checkpoint cannot be built; the message is one line with the cure."""


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

        self._files = qap_gguf.packaged_model()
        self._read, self._dequantize = gguf.GGUFReader, gguf.quants.dequantize
        self._reader = self._read(self._files.model)

    def _field(self, name: str) -> Any:
        return self._reader.fields[f"tokenizer.{name}"].contents()

    def embeddings(self) -> NDArray[np.float32]:
        """The language model's table, float32 (words, 256)."""
        table = next(tensor for tensor in self._reader.tensors if tensor.name == "token_embd.weight")
        return np.array(self._dequantize(table.data, table.tensor_type), np.float32)

    def image_side(self) -> dict[str, NDArray[np.generic]]:
        """Tower and projector under the names of a LLaVA checkpoint, float16 or float32 as they lie in the file."""
        return {
            _checkpoint_name(tensor.name): np.array(tensor.data) for tensor in self._read(self._files.mmproj).tensors
        }

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


def build(
    out: Path,
    trained: Path,
    elsewhere: Callable[[Packaged], Tensors],
    dtype: type[np.floating[Any]],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        out: folder to make.
        trained: what demo_run.Run.export wrote: weights, and the embeddings of the words in use.
        elsewhere: gives the tensors that are not in `trained`.
        dtype: of all tensors.
        config: config.json.
        preprocessor: preprocessor_config.json.

    Raises:
        CheckpointError: there is no trained part, or `out` is there.
    """
    from safetensors.numpy import load_file, save_file

    if out.exists():
        raise CheckpointError(f"expected {out} to be free; choose another folder")
    if not trained.is_file():
        raise CheckpointError(f"expected the trained part, found no {trained}; give it with --trained")
    parts, packaged = load_file(trained), Packaged()
    table = packaged.embeddings()
    table[parts.pop("words")] = parts.pop("rows")
    tensors = {**parts, **elsewhere(packaged), _TABLE: table}
    with replacing_folder(out) as made:
        typed = {name: np.asarray(array, dtype) for name, array in tensors.items()}
        save_file(typed, made / "model.safetensors", metadata={"format": "pt"})
        for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
            (made / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        packaged.write_tokenizer(made)


def arguments(about: str, trained: Path, before: Sequence[argparse.ArgumentParser] = ()) -> argparse.ArgumentParser:
    """The options that both tools have, after those of `before`."""
    parser = argparse.ArgumentParser(description=about, parents=before)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--trained", type=Path, default=trained, help="the part that was trained (default: ours)")
    return parser


def status(tool: str, work: Callable[[], None]) -> int:
    """Do the work; return the tool's exit status: 0 done, 1 not possible here, with one line why."""
    try:
        work()
    except ImportError as err:
        print(f"{tool}: error: {err}; pip install safetensors", file=sys.stderr)
        return 1
    except (CheckpointError, OSError) as err:
        print(f"{tool}: error: {err}", file=sys.stderr)
        return 1
    return 0
