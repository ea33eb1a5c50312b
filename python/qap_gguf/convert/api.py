"""`convert`: the one public function of this subpackage."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qap_gguf.errors import ConvertError, ModelFileError

from . import clip_text as text_tower
from . import language, mmproj, tokenizer
from .checkpoint import Checkpoint, read_json
from .plan import Planner
from .quantize import FLOAT_TYPES, QUANTIZE_TYPES, file_type, quantize_file
from .spec import LlavaSpec, parse
from .writer import OutputFolder, write_gguf

if TYPE_CHECKING:
    from qap_gguf.config import PruneConfig

__all__ = ["ConvertResult", "convert"]

Progress = Callable[[int, int, str], None]
_NAME = re.compile(r"[\w][\w.+-]*")


@dataclass(frozen=True)
class ConvertResult:
    """The two files that were made."""

    mmproj: Path
    model: Path


def convert(
    src: str | Path,
    out: str | Path,
    *,
    quantize: str = "Q4_K_M",
    mmproj_type: str = "f16",
    name: str | None = None,
    prune: PruneConfig | None = None,
    clip_text: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Converts a Hugging Face LLaVA-1.5-style checkpoint to `OUT/mmproj-<type>.gguf` and `OUT/<name>-<QUANT>.gguf`.

    src: the folder with config.json, model*.safetensors (F64, F32, F16 or BF16), the tokenizer and the image
        processor's config: a CLIP or SigLIP tower, a two-layer GELU projector and a Llama, Mistral or Qwen2 language
        model of any size.
    out: the folder to write to; made where it is missing. A quantized type needs room for the float model too.
    quantize: a name of QUANTIZE_TYPES, in any case. mmproj_type: "f16" or "f32".
    name: the model's name, default the folder's. prune: defaults to store in the mmproj file.
    clip_text: the folder of the CLIPModel that the vision tower comes from (config.json of model_type clip,
        *.safetensors, tokenizer); its text tower goes into the mmproj file, for PruneConfig(semantic="clip_text").
    force: replace files that are there. progress: called as progress(done, total, what), in tensors.

    Memory stays near the largest tensor. Raises ConvertError (or what `progress` raises, or KeyboardInterrupt) and then
    leaves nothing in OUT.

    Example:
        >>> try:
        ...     convert("no/such/folder", "out")
        ... except ConvertError as err:
        ...     print(err)
        expected a checkpoint folder, got no/such/folder; give the folder that holds config.json
    """
    kind, big = file_type(quantize), str(mmproj_type).lower()
    if big not in mmproj.MMPROJ_TYPES:
        raise ConvertError(f"expected mmproj_type f16 or f32, got {mmproj_type!r}; choose one of these")
    checkpoint = Checkpoint(src)
    label = name if name is not None else re.sub(r"[^\w.+-]+", "-", checkpoint.folder.resolve().name).strip("-.+")
    if not _NAME.fullmatch(label) or label.lower() == "mmproj":
        raise ConvertError(
            f"expected a name of letters, digits and . _ + - (not mmproj), got {label!r}; give name=... (--name)"
        )
    result = ConvertResult(Path(out) / f"mmproj-{big}.gguf", Path(out) / f"{label}-{kind}.gguf")
    with OutputFolder(Path(out), force) as folder:
        folder.check(result.mmproj, result.model)
        with _understanding("config.json and the image processor's config"):
            spec = parse(read_json(checkpoint.folder / "config.json"))
            keys = mmproj.metadata(spec, _processor(checkpoint.folder), label, big, _prune_keys(prune, spec))
        planner = Planner(checkpoint)
        vision = mmproj.tensors(planner, spec, big)
        if clip_text is not None:
            extra = text_tower.load(clip_text, spec.vision, big)
            keys, vision = keys | extra.metadata, vision + extra.tensors
        # The float file that the quantizer reads keeps the checkpoint's own types: nothing is rounded twice.
        text = language.tensors(planner, spec.text, kind if kind in FLOAT_TYPES else None)
        planner.finish()
        with _understanding("the tokenizer's files"):
            vocab = tokenizer.load(checkpoint.folder, spec.text)

        count = _Counter(progress, len(vision) + len(text) * (1 if kind in FLOAT_TYPES else 2))
        encoder, model = folder.temp(result.mmproj), folder.temp(result.model)
        write_gguf(encoder, "clip", keys, vision, count.step)
        ftype = QUANTIZE_TYPES[kind if kind in FLOAT_TYPES else "F16"]
        write_gguf(model, spec.text.arch, language.metadata(spec.text, vocab, label, ftype), text, count.step)
        if kind not in FLOAT_TYPES:
            plain, model = model, folder.temp(result.model)
            quantize_file(plain, model, kind, count.quantized)
            plain.unlink()
        count.finish()
        _check_made(encoder, model)
        folder.commit((model, result.model), (encoder, result.mmproj))
    return result


def _check_made(encoder: Path, model: Path) -> None:
    """What is written must be what whoever loads it lets pass; the room that it needs is another machine's affair."""
    from qap_gguf.files import check_pair

    try:
        check_pair(encoder, model, memory=False)
    except ModelFileError as err:
        reason = str(err).partition(";")[0]
        raise ConvertError(
            f"expected a checkpoint that makes a usable model, got one that does not ({reason}); fetch it again"
        ) from err


@contextlib.contextmanager
def _understanding(what: str) -> Iterator[None]:
    """JSON of another structure than any that was foreseen ends in one line too."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as err:
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ConvertError(f"cannot understand {what} ({reason}); fetch the checkpoint again") from err


def _processor(folder: Path) -> dict[str, Any]:
    """The image processor's config, whichever of its two names it has."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    raise ConvertError(
        f"expected preprocessor_config.json or processor_config.json in {folder}, found neither; "
        "fetch the whole checkpoint"
    )


def _prune_keys(prune: PruneConfig | None, spec: LlavaSpec) -> dict[str, Any]:
    if prune is None:
        return {}
    prune.count(spec.vision.n_tokens)  # raises ConfigError where n_keep is more than the model has
    return dict(prune.to_metadata())


class _Counter:
    """Calls `progress(done, total, what)`; `done` never falls and ends at `total`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done, self.before = progress, total, 0, -1

    def step(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)

    def quantized(self, done: int, total: int) -> None:
        """`done` of `total` tensors went through the quantizer, whose count may differ from ours by the copied ones."""
        if self.before < 0:
            self.before = self.done
        reached = min(self.before + done * (self.total - self.before) // max(total, 1), self.total)
        if reached > self.done:
            self.done = reached - 1
            self.step("quantize")

    def finish(self) -> None:
        if self.done < self.total:
            self.done = self.total - 1
            self.step("done")
