"""`convert`: the one public function of this subpackage."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qap_gguf.config import WEIGHTS_KEY
from qap_gguf.convert.llava import clip_text as text_tower
from qap_gguf.convert.llava import language, mmproj
from qap_gguf.convert.llava.original import is_original
from qap_gguf.convert.llava.source import open_llava
from qap_gguf.convert.llava.spec import parse
from qap_gguf.convert.llava.tensor_plan import Planner
from qap_gguf.convert.output.disk_space import require_space
from qap_gguf.convert.output.imatrix import Imatrix, channel_weights, read_imatrix
from qap_gguf.convert.output.quantize import FLOAT_TYPES, QUANTIZE_TYPES, file_type, least_bytes, quantize_file
from qap_gguf.convert.output.writer import OutputFolder, TensorPlan, f32_list, write_gguf
from qap_gguf.convert.quantize import Measure, measured
from qap_gguf.convert.relabel.api import keep_places
from qap_gguf.convert.source.checkpoint import checkpoint_folder, read_json
from qap_gguf.convert.source.hub import fetch, model_name
from qap_gguf.convert.tokenizers import bpe
from qap_gguf.convert.tokenizers import load as tokenizer
from qap_gguf.convert.upstream.families import FamilyFiles, check_family, convert_family, is_llava
from qap_gguf.errors import ConvertError, ModelFileError

if TYPE_CHECKING:
    from qap_gguf.config import PruneConfig

__all__ = ["ConvertResult", "check_supported", "convert"]

Progress = Callable[[int, int, str], None]
_NAME = re.compile(r"[\w][\w.+-]*")


@dataclass(frozen=True)
class ConvertResult:
    """The two files that were made; `notes` are lines about choices that were not the caller's."""

    mmproj: Path
    model: Path
    notes: tuple[str, ...] = ()


def convert(
    src: str | Path,
    out: str | Path,
    *,
    quantize: str = "Q4_K_M",
    mmproj_type: str = "f16",
    name: str | None = None,
    prune: PruneConfig | None = None,
    vision_tower: str | Path | None = None,
    clip_text: str | Path | None = None,
    imatrix: str | Path | Measure | None = None,
    keep_positions: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Converts a vision-language checkpoint to `OUT/mmproj-<type>.gguf` and `OUT/<name>-<QUANT>.gguf`.

    src: a folder with config.json, model*.safetensors or pytorch_model*.bin (F64, F32, F16 or BF16; the latter need
        torch), the tokenizer and the image processor's config; or a model's id on the Hugging Face hub, owner/name or
        owner/name@revision (extra `hub`). A LLaVA (1.5 or NeXT, as transformers or as its authors save it) has a CLIP
        or SigLIP tower, a two-layer GELU projector and a Llama, Mistral or Qwen2 language model. Other families
        (Qwen-VL, Gemma 3, SmolVLM, InternVL, Pixtral, ...) go through llama.cpp's own converter, which needs the extra
        `convert`; no code that such a checkpoint brings is run.
    out: the folder to write to; made where it is missing. A quantized type needs room for the float model too; the
        room is checked before anything is written.
    quantize: a name of QUANTIZE_TYPES, in any case. mmproj_type: of the mmproj's matrices, "f32", "f16", "bf16" or
        "q8_0"; rows that are no multiple of 32 stay f16 with q8_0, which a note says.
    name: the model's name, default the folder's. prune: defaults to store in the mmproj file; with error "model" the
        channel weights of `imatrix`, a file, are stored too.
    vision_tower: the folder or hub id of the CLIP or SigLIP that a checkpoint in the layout of LLaVA's authors names as
        mm_vision_tower; not needed where the checkpoint carries a public tower's weights.
    clip_text: the folder or hub id of the CLIPModel that the vision tower comes from (config.json of model_type clip,
        *.safetensors, tokenizer); its text tower goes into the mmproj file, for PruneConfig(semantic="clip_text").
    imatrix: a file of llama-imatrix for this model (GGUF, or the older format), passed on to the quantizer; or what
        makes one, called as imatrix(model, mmproj) with the two float files before the model is quantized.
    keep_positions: write a language model whose kept image tokens can stay at their own positions, see relabel(): None
        does so where it can be done, True else raises ConvertError, False never does. Stock llama.cpp misplaces the
        images of such a file, and says nothing; `notes` say which it is.
    force: replace files that are there. progress: called as progress(done, total, what), in tensors, or in thousandths
        of four stages for other families than LLaVA.

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
        raise ConvertError(
            f"expected mmproj_type {', '.join(mmproj.MMPROJ_TYPES)}, got {mmproj_type!r}; choose one of these, or f16 "
            "and then requantize() that file (qap-gguf convert FILE OUT --mmproj-type)"
        )
    if imatrix is not None and kind in FLOAT_TYPES:
        raise ConvertError(f"expected a quantized type with an imatrix, got {kind}; choose one, or leave imatrix out")
    importance = imatrix if imatrix is None or callable(imatrix) else read_imatrix(imatrix)
    weighted = prune is not None and prune.error == "model"
    if weighted and not isinstance(importance, Imatrix):
        raise ConvertError(
            "error: expected an imatrix that is there already for model, got none; give imatrix=FILE (--imatrix), or "
            "convert with int4 and then annotate(..., imatrix=FILE) (--annotate --error model --imatrix FILE)"
        )
    label = name if name is not None else re.sub(r"[^\w.+-]+", "-", model_name(src)).strip("-.+")
    if not _NAME.fullmatch(label) or label.lower() == "mmproj":
        raise ConvertError(
            f"expected a name of letters, digits and . _ + - (not mmproj), got {label!r}; give name=... (--name)"
        )
    result = ConvertResult(Path(out) / f"mmproj-{big}.gguf", Path(out) / f"{label}-{kind}.gguf")
    with OutputFolder(Path(out), force) as folder:
        folder.check(result.mmproj, result.model)
        source = checkpoint_folder(fetch(src, check_supported))
        config = read_json(source / "config.json")
        if not is_llava(config):
            for key, given in (("clip_text", clip_text), ("vision_tower", vision_tower)):
                if given is not None:
                    raise ConvertError(f"{key}: expected a LLaVA, got another model; leave it out")
            files = FamilyFiles(result.mmproj, result.model, big, kind, label, keep_positions)
            return replace(result, notes=convert_family(source, config, files, prune, importance, folder, progress))
        with _understanding("config.json and the image processor's config"):
            llava = open_llava(source, config, None if vision_tower is None else fetch(vision_tower))
            spec = parse(llava.config)
            keys = mmproj.metadata(
                spec, llava.processor, label, big, {} if prune is None else dict(prune.to_metadata())
            )
        planner = Planner(llava.checkpoint)
        vision = mmproj.tensors(planner, spec, big)
        if clip_text is not None:
            extra = text_tower.load(fetch(clip_text), spec.vision, big)
            keys, vision = keys | extra.metadata, vision + extra.tensors
        vision, odd = mmproj.fit_rows(vision)
        if odd:
            rows = f"{odd[0]}" + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
            result = replace(result, notes=(f"f16 instead of q8_0, rows are no multiple of 32: {rows}",))
        # The float file that the quantizer reads keeps the checkpoint's own types: nothing is rounded twice.
        text = language.tensors(planner, spec.text, kind if kind in FLOAT_TYPES else None)
        planner.finish()
        if isinstance(importance, Imatrix):
            importance.check({plan.name: plan.shape[-1] for plan in text if len(plan.shape) > 1})
            if weighted:
                keys[WEIGHTS_KEY] = f32_list(channel_weights(importance).tolist())
        with _understanding("the tokenizer's files"):
            vocab = tokenizer.load(source, spec.text)
        if vocab.pre in bpe.DIFFERENCES:
            result = replace(result, notes=(*result.notes, bpe.DIFFERENCES[vocab.pre]))

        count = _Counter(progress, len(vision) + len(text) * (1 if kind in FLOAT_TYPES else 2))
        _require_space(folder.folder, kind, vision, text, copies=1 if keep_positions is False else 2)
        encoder, model = folder.temp(result.mmproj), folder.temp(result.model)
        write_gguf(encoder, "clip", keys, vision, count.step)
        ftype = QUANTIZE_TYPES[kind if kind in FLOAT_TYPES else "F16"]
        write_gguf(model, spec.text.arch, language.metadata(spec.text, vocab, label, ftype), text, count.step)
        if kind not in FLOAT_TYPES:
            plain, model = model, folder.temp(result.model)
            if callable(importance):
                importance = measured(importance, plain, encoder, folder, relabelled=keep_positions)
            quantize_file(plain, model, kind, count.quantized, importance)
            plain.unlink()
        if keep_positions is not False:
            temp = folder.temp(result.model)
            model, said = keep_places(model, temp, result.model, must=keep_positions is True)
            result = replace(result, notes=(*result.notes, *said))
        count.finish()
        _check_made(encoder, model)
        folder.commit((model, result.model), (encoder, result.mmproj))
    return result


def check_supported(folder: Path) -> None:
    """Raises ConvertError where config.json in `folder` names a model that cannot be converted; before a download."""
    config = read_json(folder / "config.json")
    if not is_llava(config):
        check_family(config)
    elif not is_original(config):
        with _understanding("config.json"):
            parse(config)


def _require_space(folder: Path, kind: str, vision: list[TensorPlan], text: list[TensorPlan], copies: int) -> None:
    """The float files take what their tensors take; the quantized one, beside its float file, at least that much.

    copies: of the language model that is left in the end, which are there at once. Copies of a quantized one take no
    more than the float file that is gone by then.
    """
    quantized = 0 if kind in FLOAT_TYPES else least_bytes(kind, sum(math.prod(plan.shape) for plan in text))
    more = sum(plan.nbytes for plan in text) * (copies - 1) if kind in FLOAT_TYPES else 0
    require_space(folder, sum(plan.nbytes for plan in vision + text) + quantized + more)


def _check_made(encoder: Path, model: Path) -> None:
    """What is written must be what whoever loads it lets pass; the room that it needs is another machine's affair."""
    from qap_gguf.files.gguf import check_pair

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
