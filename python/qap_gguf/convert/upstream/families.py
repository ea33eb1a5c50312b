"""Families of models that llama.cpp's own converter knows: it makes the files, we check, name, annotate and quantize.

What is ours: NaN and missing shards are found before; files that llama.cpp would not load are an error (the converter
ends well even without any tensor); unknown tokenizers are recognized by their structure; qap.* keys; quantized types.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf import _core
from qap_gguf.config import PruneConfig
from qap_gguf.convert.annotate import annotate
from qap_gguf.convert.output.disk_space import require_space
from qap_gguf.convert.output.imatrix import Imatrix
from qap_gguf.convert.output.quantize import FLOAT_TYPES, least_bytes, quantize_file
from qap_gguf.convert.output.writer import OutputFolder
from qap_gguf.convert.quantize import Measure, matrix_widths, measured
from qap_gguf.convert.relabel.api import keep_places
from qap_gguf.convert.source.checkpoint import Checkpoint, read_json
from qap_gguf.convert.tokenizers import bpe
from qap_gguf.convert.upstream.run import architecture, known_architectures, run_converter, view
from qap_gguf.errors import ConvertError, QapError
from qap_gguf.files.gguf import check_vision, read_gguf

__all__ = ["FamilyFiles", "check_family", "convert_family", "is_llava"]

Progress = Callable[[int, int, str], None]
_FLOAT_NAMES = {"F32": "f32", "F64": "f32", "F16": "f16"}  # a checkpoint's main type -> the converter's; else bf16
_STEPS = 1000  # of each stage, as progress() counts them


@dataclass(frozen=True)
class FamilyFiles:
    """Where a family's files go, and as which types: `mmproj_type` as the converter names it, `kind` as llama.cpp."""

    mmproj: Path
    model: Path
    mmproj_type: str
    kind: str
    label: str
    keep_positions: bool | None = None


def is_llava(config: dict[str, Any]) -> bool:
    """Whether a parsed config.json belongs to a LLaVA that this package converts by itself.

    Example:
        >>> is_llava({"model_type": "llava"})
        True
        >>> is_llava({"model_type": "llava", "vision_config": {"model_type": "pixtral"}})
        False
    """
    vision = config.get("vision_config")
    if isinstance(vision, dict) and vision.get("model_type") == "pixtral":
        return False
    return str(config.get("model_type", "")).startswith("llava") or architecture(config).startswith("Llava")


def check_family(config: dict[str, Any]) -> str:
    """The architecture that a parsed config.json names. Raises ConvertError if llama.cpp's converter lacks it."""
    name, known = architecture(config), known_architectures()
    if name not in known:
        raise ConvertError(
            f"expected a LLaVA or one of the {len(known)} architectures with a vision encoder that llama.cpp's "
            f"converter knows, got {name or config.get('model_type')!r}; this model cannot be converted"
        )
    return name


def convert_family(
    src: Path, config: dict[str, Any], files: FamilyFiles, prune: PruneConfig | None,
    importance: Imatrix | Measure | None, folder: OutputFolder, progress: Progress | None,
) -> tuple[str, ...]:  # fmt: skip
    """Makes both files in `folder` and gives them their final names. `config`: the parsed config.json of `src`.

    Returns notes about choices that were not the caller's.
    Raises ConvertError for an architecture that the converter does not know, and for what it refuses.
    """
    name = check_family(config)
    checkpoint = Checkpoint(src, rename=str)
    if not checkpoint.tensors:
        raise ConvertError(f"expected tensors in {src}, found none; fetch the checkpoint again")
    kinds: Counter[str] = Counter()
    n_weights = 0
    for ref in checkpoint.tensors.values():
        kinds[ref.dtype] += ref.nbytes
        n_weights += math.prod(ref.shape)
    plain = files.kind if files.kind in FLOAT_TYPES else _FLOAT_NAMES.get(kinds.most_common(1)[0][0], "bf16")
    quantized = 0 if files.kind in FLOAT_TYPES else least_bytes(files.kind, n_weights)
    copies = 2 if files.kind in FLOAT_TYPES and files.keep_positions is not False else 1
    require_space(folder.folder, n_weights * (4 if plain.upper() == "F32" else 2) * copies + quantized)
    stages = _Stages(progress, 3 if files.kind in FLOAT_TYPES else 4)
    for i, ref in enumerate(checkpoint.tensors.values(), 1):
        ref.read()  # raises on NaN
        stages.at(i / len(checkpoint.tensors), "check")
    encoder, model = folder.temp(files.mmproj), folder.temp(files.model)
    stages.next()
    with view(src) as place:
        common = [str(place), "--model-name", files.label]
        runs = {
            f"the vision encoder of {name}": ["--mmproj", "--outtype", files.mmproj_type, "--outfile", str(encoder)],
            f"the language model of {name}": ["--outtype", plain.lower(), "--outfile", str(model)],
        }
        runs = {what: common + run for what, run in runs.items()}
        pre = _pre_tokenizer(src)
        run_converter(runs, pre, lambda i, part: stages.at(part, ("encoder", "language model")[i], i))
    _check_pair(encoder, model, name)
    stages.next(2)
    if files.kind not in FLOAT_TYPES:
        whole, model = model, folder.temp(files.model)
        if isinstance(importance, Imatrix):
            importance.check(matrix_widths(whole))
        elif importance is not None:
            importance = measured(importance, whole, encoder, folder, relabelled=files.keep_positions)
        quantize_file(whole, model, files.kind, stages.quantized, importance)
        whole.unlink()
    notes: tuple[str, ...] = (bpe.DIFFERENCES[pre],) if pre in bpe.DIFFERENCES else ()
    if files.keep_positions is not False:
        temp = folder.temp(files.model)
        model, said = keep_places(model, temp, files.model, must=files.keep_positions is True)
        notes = (*notes, *said)
    if prune is not None:
        bare, encoder = encoder, folder.temp(files.mmproj)
        try:
            weights = importance if prune.error == "model" and isinstance(importance, Imatrix) else None
            annotate(bare, encoder, prune, imatrix=weights)
        except QapError as err:  # of the hidden file, which nobody knows
            raise type(err)(str(err).replace(str(bare), str(files.mmproj))) from err
    stages.finish()
    folder.commit((model, files.model), (encoder, files.mmproj))
    return notes


def _pre_tokenizer(src: Path) -> str:
    """llama.cpp's name for the pre-tokenizer by the structure of tokenizer.json, "" where there is none that fits."""
    if not (src / "tokenizer.json").is_file():
        return ""
    try:
        return bpe.pre_tokenizer(read_json(src / "tokenizer.json"))
    except (ConvertError, KeyError, TypeError, AttributeError):
        return ""  # the converter has its own ways, and its own words where it fails


def _check_pair(mmproj: Path, model: Path, name: str) -> None:
    """Raises ConvertError unless the converter wrote two whole files that llama.cpp loads together."""
    try:
        check_vision(read_gguf(mmproj))
        read_gguf(model)
        _core.inspect_mmproj(str(mmproj), str(model))
    except (QapError, RuntimeError) as err:
        reason = " ".join(str(err).replace(str(mmproj), "the mmproj").replace(str(model), "the language model").split())
        raise ConvertError(
            f"expected two files that llama.cpp loads out of its converter for {name}, got a refusal ({reason}); "
            "config.json belongs to other weights, or this model is not supported"
        ) from err


class _Stages:
    """Calls `progress(done, total, what)`; `done` never falls and ends at `total`."""

    def __init__(self, progress: Progress | None, count: int) -> None:
        self.progress, self.stage, self.done, self.total = progress, 0, -1, count * _STEPS

    def next(self, count: int = 1) -> None:
        self.stage += count

    def quantized(self, done: int, total: int) -> None:
        self.at(done / max(total, 1), "quantize")

    def finish(self) -> None:
        self.stage = self.total // _STEPS - 1
        self.at(1.0, "done")

    def at(self, part: float, what: str, later: int = 0) -> None:
        """`part` of the stage, or of the one `later` ones after it, is done. Its start counts as one step."""
        done = (self.stage + later) * _STEPS + max(int(min(part, 1.0) * _STEPS), 1)
        if done > self.done:
            self.done = done
            if self.progress is not None:
                self.progress(done, self.total, what)
