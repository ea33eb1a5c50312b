"""`quantize`: a GGUF language model in another type, for those who hold no checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf

from qap_gguf.convert.output.disk_space import require_space
from qap_gguf.convert.output.imatrix import Imatrix, read_imatrix
from qap_gguf.convert.output.quantize import FLOAT_TYPES, file_type, least_bytes, quantize_file
from qap_gguf.convert.output.raw_header import read_layout
from qap_gguf.convert.output.writer import OutputFolder
from qap_gguf.convert.relabel.api import relabel
from qap_gguf.convert.relabel.rules import change_of, has_mrope
from qap_gguf.errors import ConvertError
from qap_gguf.files.gguf import check_language, read_gguf

__all__ = ["Measure", "matrix_widths", "measured", "quantize"]

#: measure(model, mmproj) -> the imatrix file that it made for this pair
Measure = Callable[[Path, Path], str | Path]


def quantize(
    src: str | Path,
    out: str | Path,
    *,
    type: str = "Q4_K_M",  # noqa: A002 - what everybody calls it
    imatrix: str | Path | None = None,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Quantizes the language model `src`, best one in F16 or BF16, to the file `out` by llama.cpp's own quantizer.

    type: a name of QUANTIZE_TYPES, in any case. imatrix: an importance matrix of this model, by ``qap-gguf imatrix`` or
        llama-imatrix. force: replace `out` if it is there. progress: called as progress(done, total, "quantize").

    Returns `out`. Raises ModelFileError if `src` is no whole language model, ConvertError if the imatrix is another
    model's or damaged, `out` is there or cannot be written, or the quantizer refuses; then `out` is as it was.

    Example:
        >>> import tempfile
        >>> import qap_gguf as qap
        >>> try:
        ...     quantize(qap.packaged_model().model, "out.gguf", type="Q9")
        ... except ConvertError as err:
        ...     print(str(err)[:42])
        expected quantize as one of F32, F16, BF16
    """
    kind, source, target = file_type(type), Path(src), Path(out)
    if imatrix is not None and kind in FLOAT_TYPES:
        raise ConvertError(f"expected a quantized type with an imatrix, got {kind}; choose one, or leave imatrix out")
    importance = None if imatrix is None else read_imatrix(imatrix)
    check_language(source, memory=False)
    if importance is not None:
        importance.check(matrix_widths(source))
    with OutputFolder(target.parent, force) as folder:
        folder.check(target)
        if target.exists() and target.samefile(source):
            raise ConvertError(f"expected another file than {source} to write, got the same; choose another OUT")
        require_space(folder.folder, least_bytes(kind, sum(math.prod(shape) for shape in _shapes(source).values())))
        new = folder.temp(target)
        step = None if progress is None else lambda done, total: progress(done, total, "quantize")
        quantize_file(source, new, kind, step, importance)
        check_language(new, memory=False)
        folder.commit((new, target))
    return target


def matrix_widths(model: Path) -> dict[str, int]:
    """Values that an importance matrix has for each matrix of a file: one for each column (of each expert)."""
    return {name: shape[0] * math.prod(shape[2:]) for name, shape in _shapes(model).items() if len(shape) > 1}


def _shapes(model: Path) -> dict[str, list[int]]:
    return {tensor.name: [int(n) for n in tensor.shape] for tensor in gguf.GGUFReader(model).tensors}


def measured(measure: Measure, model: Path, mmproj: Path, folder: OutputFolder, *, relabelled: bool | None) -> Imatrix:
    """The importance matrix of the float file `model`, which stands in `folder` under a temporary name.

    relabelled: measure a copy whose image tokens keep their places, as the file that is being made will; None: where
        there can be one.
    """
    read, info = model, read_gguf(model)
    if relabelled is not False and not has_mrope(info):
        try:
            change_of(info, read_layout(model))
        except ConvertError:
            if relabelled:
                raise
        else:
            read = relabel(model, folder.temp(model))
    found = read_imatrix(measure(read, mmproj))
    if read != model:
        read.unlink()
    found.check(matrix_widths(model))
    return found
