"""Where stock llama.cpp (0c1e570) runs an image encoder differently from how it was trained, seen from a header.

Facts: measured against transformers 5.23 on random weights and the same pixels; llama.cpp's issues where they have a
number, the patches in native/upstream, tests/parity. A patch named here is in our libmtmd: then we fix the defect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qap_gguf import _core
from qap_gguf.files.gguf import GgufInfo

__all__ = ["RELABELLED", "Defect", "find_defects"]

_CLASS = "v.class_embd"
_GRID = "clip.vision.image_grid_pinpoints"
_LLAVA_GRAPH = ("mlp", "ldp", "ldpv2")  # projectors behind tools/mtmd/models/llava.cpp with a CLIP or SigLIP tower
#: smart_resize() of transformers, in Python
_ROUNDED = (
    "qwen2vl_merger",
    "qwen2.5vl_merger",
    "qwen3vl_merger",
    "glm4v",
    "paddleocr",
    "exaone4_5",
    "hunyuanvl",
    "lfm2",
)
_LETTERBOXED = tuple(name for name in _core.projectors("resize") if name != "internvl")  # it has a row of its own


@dataclass(frozen=True)
class Defect:
    """One way in which stock llama.cpp departs from the trained model.

    Attributes:
        text: what happens, one line.
        issue: number of llama.cpp's issue, where there is one.
        patch: name of the patch in native/upstream that fixes it here, None where there is none.
    """

    text: str
    issue: int | None = None
    patch: str | None = None

    @property
    def fixed(self) -> bool:
        """This package's libmtmd runs the encoder as trained (unless QAP_STOCK_ENCODER=1)."""
        return self.patch is not None


def find_defects(info: GgufInfo, projector: str) -> tuple[Defect, ...]:
    """The defects that hit an mmproj file.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.files.gguf import read_gguf
        >>> [(d.issue, d.fixed) for d in find_defects(read_gguf(qap.packaged_model().mmproj), "mlp")]
        [(25814, True)]
    """
    return tuple(defect for hits, defect in _TABLE if hits(info, projector))


def _llava(info: GgufInfo, projector: str) -> bool:
    return projector in _LLAVA_GRAPH


def _of(*projectors: str) -> Callable[[GgufInfo, str], bool]:
    return lambda _, projector: projector in projectors


def _with_class(hits: Callable[[GgufInfo, str], bool]) -> Callable[[GgufInfo, str], bool]:
    return lambda info, projector: hits(info, projector) and _CLASS in info.tensors


def _tiled_llava(info: GgufInfo, projector: str) -> bool:
    """LLaVA-NeXT: grid points, or the row of weights that ends each line of patches."""
    return _llava(info, projector) and (_newline(info) or _GRID in info.metadata)


def _newline(info: GgufInfo) -> bool:
    return any(name in info.tensors for name in ("v.image_newline", "model.image_newline"))


def _packable(info: GgufInfo, projector: str) -> bool:
    """Has what native/src/families/pack.cpp needs."""
    return projector == "mlp" and _newline(info) and _GRID in info.metadata


def _layers_by_count(info: GgufInfo, projector: str) -> bool:
    """Nothing says which layer's output is used: the graph stops one before the last that is stored."""
    return _llava(info, projector) and "clip.vision.feature_layer" not in info.metadata


#: what hits a relabelled language model: qap.origin.architecture is ours (native/src/positions.cpp)
RELABELLED = Defect(
    "all image tokens of a picture get one position with a relabelled language model, and answers are wrong without a "
    "word; convert --keep-positions --undo gives the original",
    patch="001-hooks.patch",
)
_TABLE: tuple[tuple[Callable[[GgufInfo, str], bool], Defect], ...] = (
    (
        _with_class(_llava),
        Defect(
            "the class token is put after the patches: each patch gets its neighbour's position, the first is dropped",
            25814,
            "002-llava-encoder.patch",
        ),
    ),
    (
        _with_class(_layers_by_count),
        Defect(
            "no clip.vision.feature_layer: the last layer that is stored does not run, though it was trained to",
            25817,
            "002-llava-encoder.patch",
        ),
    ),
    (
        lambda info, projector: _layers_by_count(info, projector) and _CLASS not in info.tensors,
        Defect(
            "no clip.vision.feature_layer: the last layer that is stored does not run; whether it was trained to "
            "cannot be seen in the file, so convert the checkpoint anew"
        ),
    ),
    (
        lambda info, projector: _tiled_llava(info, projector) and _packable(info, projector),
        Defect(
            "LLaVA-NeXT's tiles stand in front of the overview, one after another, without image_newline rows",
            patch="007-llava-next.patch",
        ),
    ),
    (
        lambda info, projector: _tiled_llava(info, projector) and not _packable(info, projector),
        Defect(
            "LLaVA-NeXT's tiles cannot be packed as trained: its grid points, its image_newline or its projector (mlp) "
            "is not there; convert the checkpoint anew"
        ),
    ),
    (
        _with_class(_of("internvl")),
        Defect(
            "the class token is put after the patches: every patch gets its predecessor's position",
            patch="003-internvl-class-token.patch",
        ),
    ),
    (
        _of("internvl"),
        Defect(
            "pictures are cut into another grid of tiles than in training, small ones into none",
            patch="008-internvl-tiles.patch",
        ),
    ),
    (
        _with_class(_of("cogvlm")),
        Defect("the class token is put after the patches, as in InternVL (seen in the source, not measured)"),
    ),
    (
        _of("llama4"),
        Defect(
            "the grid of patches is transposed, and the converter writes ln2 under another name",
            patch="004-llama4-encoder.patch",
        ),
    ),
    (
        _of("llama4"),
        Defect(
            "pictures are cut into other tiles than in training (at most 3 x 3 instead of up to 16), and centred",
            patch="004-llama4-encoder.patch",
        ),
    ),
    (
        _of("pixtral"),
        Defect(
            "rows of [IMG_BREAK] are made from memory that was never set: some images give NaN",
            patch="005-pixtral-breaks.patch",
        ),
    ),
    (
        _of("pixtral"),
        Defect(
            "pictures have 8 to 1024 tokens, where training left them as they are up to a longest edge",
            patch="006-resize.patch",
        ),
    ),
    (
        _of("lightonocr"),
        Defect(
            "pictures are enlarged to the longest edge, where training left small ones as they are",
            patch="006-resize.patch",
        ),
    ),
    (
        _of("lightonocr"),
        Defect(
            "<|im_start|> and <|im_end|> stand around a picture in the prompt, where training wrote nothing",
            patch="021-words.patch",
        ),
    ),
    (
        _of("janus_pro"),
        Defect(
            "<begin_of_image> and <end_of_image> do not stand around a picture in the prompt, as they did in training",
            patch="021-words.patch",
        ),
    ),
    (
        _of("gemma4v"),
        Defect(
            "the file does not name the feed-forward's function, and another one is taken than in training",
            patch="017-gemma4-gelu.patch",
        ),
    ),
    (
        _of("gemma3", "gemma3nv"),
        Defect(
            "no blank line stands before and after a picture in the prompt, as it did in training",
            patch="020-gemma3-breaks.patch",
        ),
    ),
    (
        _of("minicpmv4_6"),
        Defect(
            "pictures are cut into slices by the length of their sides, not by their area",
            patch="016-minicpmv4-6-slices.patch",
        ),
    ),
    (
        _of("paddleocr"),
        Defect(
            "positions of a picture with fewer lines or columns of patches than the table are resized with "
            "antialiasing, which training did not",
            patch="014-paddleocr-positions.patch",
        ),
    ),
    (
        _of("kimivl"),
        Defect(
            "rotary positions take the halves of a head for column and line, where pairs of the two alternate, and "
            "learned ones are resized by another rule than in training",
            patch="019-kimivl-tower.patch",
        ),
    ),
    (
        _of("kimivl", "kimik25"),
        Defect(
            "pictures are letterboxed to the nearest whole tokens; in training they were never enlarged, and stood at "
            "the top left of a canvas of whole tokens",
            patch="018-kimi-canvas.patch",
        ),
    ),
    (
        _of("hunyuanvl"),
        Defect(
            "pictures are resized with another filter (Lanczos) than in training (bicubic)", patch="006-resize.patch"
        ),
    ),
    (
        _of("hunyuanvl"),
        Defect(
            "the language model's text stands at 0 on the fourth axis of its positions, where training counted it: "
            "answers differ, without a picture too"
        ),
    ),
    (
        _of(*_ROUNDED),
        Defect(
            "sides halfway between two numbers of tokens are rounded up, where training rounded to the even number",
            patch="006-resize.patch",
        ),
    ),
    (
        _of(*_LETTERBOXED),
        Defect(
            "images are padded with black to the model's shape, where training stretched them",
            patch="006-resize.patch",
        ),
    ),
)
