"""A checkpoint folder: its JSON files, and its tensors, read one at a time from safetensors or torch files.

Names: transformers 4 and 5 save the same LLaVA under several prefixes; `canonical` maps all of them to one.
A folder may come from anywhere, so a link in it must not lead out of it. The one exception is the hub's cache, whose
snapshots are links into the `blobs` folder beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qap_gguf.convert.source.safetensors_file import Array, TensorRef, one_line, safetensors_header
from qap_gguf.convert.source.torch_file import torch_tensors
from qap_gguf.errors import ConvertError
from qap_gguf.files.regular import read_text

__all__ = ["WEIGHT_FILES", "Array", "Checkpoint", "TensorRef", "canonical", "checkpoint_folder", "read_json"]

_SUFFIX = ".index.json"
# In the order in which they are looked for; an index goes before a single file of the same kind.
_WEIGHTS: tuple[tuple[str, Callable[[Path], dict[str, TensorRef]]], ...] = (
    ("model.safetensors", safetensors_header),
    ("pytorch_model.bin", torch_tensors),
)
WEIGHT_FILES = tuple(name for name, _ in _WEIGHTS)
_READ = {".json", ".jinja", ".safetensors", ".bin", ".model", ".txt"}  # endings of what a conversion reads
_PREFIXES = (
    (re.compile(r"^(?:language_model\.)?lm_head\."), "language_model.lm_head."),
    (re.compile(r"^language_model\.(?:model\.)?"), "language_model.model."),
    (re.compile(r"^vision_tower\.(?:vision_model\.)?"), "vision_tower.vision_model."),
    (re.compile(r"^multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^image_newline$"), "image_newline"),
)


def canonical(name: str) -> str:
    """The one name that this package uses for a tensor, whatever version of transformers saved it.

    Example:
        >>> canonical("model.language_model.norm.weight")
        'language_model.model.norm.weight'
        >>> canonical("vision_tower.post_layernorm.bias")
        'vision_tower.vision_model.post_layernorm.bias'
    """
    short = name.removeprefix("model.")
    for pattern, prefix in _PREFIXES:
        if pattern.match(short):
            return pattern.sub(prefix, short, count=1)
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConvertError where there is none."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise ConvertError(f"expected a file {path}, found none; give a complete Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as err:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ConvertError(f"cannot read {path} as JSON ({one_line(err)}); fetch the checkpoint again") from err
    if not isinstance(value, dict):
        raise ConvertError(f"expected a JSON object in {path}, got {type(value).__name__}; fetch the checkpoint again")
    return value


def checkpoint_folder(src: str | Path) -> Path:
    """`src` as a path. Raises ConvertError unless it is a folder whose files do not lead out of it.

    A chat template that is a link to a private file would end up in the model that is given away.
    """
    folder = Path(src)
    if not folder.is_dir():
        raise ConvertError(f"expected a checkpoint folder, got {folder}; give the folder that holds config.json")
    real = folder.resolve()
    allowed = [real]
    if real.parent.name == "snapshots":
        allowed.append(real.parent.parent / "blobs")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.suffix in _READ:
            target = path.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                raise ConvertError(
                    f"expected all files of the checkpoint in {folder}, got a link {path.name} to {target}; "
                    "put the file itself there if you trust it"
                )
    return folder


class Checkpoint:
    """The tensors of a checkpoint folder by canonical name (or by what `rename` makes of it), single file or sharded.

    Example:
        >>> try:
        ...     Checkpoint("no/such/folder")
        ... except ConvertError as err:
        ...     print(err)
        expected a checkpoint folder, got no/such/folder; give the folder that holds config.json
    """

    def __init__(self, folder: str | Path, rename: Callable[[str], str] = canonical) -> None:
        self.folder = checkpoint_folder(folder)
        self.tensors: dict[str, TensorRef] = {}
        for ref in self._refs():
            name = rename(ref.name)
            if name in self.tensors:
                raise ConvertError(
                    f"expected each tensor once, got {self.tensors[name].name} and {ref.name}; remove one of the two"
                )
            self.tensors[name] = ref

    def _refs(self) -> Iterator[TensorRef]:
        for single, read in _WEIGHTS:
            if (self.folder / (single + _SUFFIX)).is_file():
                yield from self._sharded(single + _SUFFIX, read)
                return
            if (self.folder / single).is_file():
                yield from read(self.folder / single).values()
                return
        names = " or ".join(name for single, _ in _WEIGHTS for name in (single, single + _SUFFIX))
        raise ConvertError(
            f"expected {names} in {self.folder}, found none of them; save the model with save_pretrained"
        )

    def _sharded(self, index: str, read: Callable[[Path], dict[str, TensorRef]]) -> Iterator[TensorRef]:
        places = read_json(self.folder / index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
            raise ConvertError(
                f"expected a weight_map of tensor and file names in {self.folder / index}; fetch the checkpoint again"
            )
        headers: dict[str, dict[str, TensorRef]] = {}
        for name, shard in places.items():
            if shard not in headers:
                path = self.folder / shard
                if Path(shard).name != shard or not path.is_file():
                    raise ConvertError(
                        f"expected the shard {path} that {index} names, found none; fetch the checkpoint again"
                    )
                headers[shard] = read(path)
            if name not in headers[shard]:
                raise ConvertError(
                    f"expected tensor {name} in {shard} as {index} says, found none; fetch the checkpoint again"
                )
            yield headers[shard][name]
