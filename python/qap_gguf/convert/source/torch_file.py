"""Tensors out of `pytorch_model.bin`, by torch itself: a pickle that may hold nothing but weights.

Facts: torch.load (weights_only, mmap). With weights_only torch runs no code of the file; before 2.6 that could be got
around, so older ones are refused. A file is opened again for each tensor: parsing takes milliseconds, and what is
mapped for one tensor is given back before the next, so that memory stays near the largest one.
"""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf.convert.source.safetensors_file import FLOATS, Array, TensorRef, one_line
from qap_gguf.errors import ConvertError
from qap_gguf.files.regular import open_regular

__all__ = ["TorchRef", "torch_tensors"]

_OLDEST = (2, 6)
_FORBIDDEN = re.compile(r"GLOBAL\s+([\w.]+)|allow-list[^\n]*?([\w.]+)\s+by default")


@dataclass(frozen=True)
class TorchRef(TensorRef):
    """One tensor of a torch file; `offset` is not used."""

    def flat(self) -> Array:
        import torch

        tensor = _load(self.path)[self.name].detach().contiguous().reshape(-1)
        if tensor.dtype == torch.bfloat16:
            bits: Array = tensor.view(torch.int16).numpy().view("<u2")
            return bits
        values: Array = tensor.numpy()
        return values


def torch_tensors(path: Path) -> dict[str, TensorRef]:
    """All tensors of one torch file. Raises ConvertError without torch, and for a pickle that holds anything else."""
    try:
        import torch
    except ImportError:
        raise ConvertError(
            f"expected torch to read {path.name}, found none; pip install torch, or save the checkpoint as safetensors"
        ) from None
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < _OLDEST:
        raise ConvertError(
            f"expected torch {'.'.join(map(str, _OLDEST))} or newer to read {path.name} safely, got "
            f"{torch.__version__}; pip install --upgrade torch"
        )
    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL",
    }  # fmt: skip
    found: dict[str, TensorRef] = {}
    for name, tensor in _load(path).items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ConvertError(
                f"expected a table of names and plain tensors in {path}, got {type(tensor).__name__} as {name!r}; "
                "save the model with save_pretrained"
            )
        if tensor.dtype not in names:
            raise ConvertError(
                f"expected float weights ({', '.join(FLOATS)}), got {tensor.dtype} in {name}; "
                "convert the checkpoint that is not quantized"
            )
        found[name] = TorchRef(name, path, names[tensor.dtype], tuple(tensor.shape), 0)
    return found


def _load(path: Path) -> dict[str, Any]:
    import torch

    try:
        open_regular(path).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's words about its own older classes
            table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as err:
        found = _FORBIDDEN.search(str(err))
        what = f"it asks for {found[1] or found[2]}" if found else one_line(err, 120)
        raise ConvertError(
            f"expected weights only in {path}, got a pickle with something else in it ({what}); do not use this file"
        ) from None
    except MemoryError:
        raise
    except Exception as err:  # a damaged file may end in any error of zipfile, pickle or torch
        if "mmap can only be used" in str(err):
            raise ConvertError(
                f"expected {path} in the zip format of torch 1.6 and newer, got another; fetch the checkpoint "
                "again, as safetensors if there are any"
            ) from None
        raise ConvertError(
            f"cannot read {path} as a torch file ({one_line(err, 120)}); fetch the checkpoint again"
        ) from err
    if not isinstance(table, dict):
        raise ConvertError(
            f"expected a table of tensors in {path}, got {type(table).__name__}; save the model with save_pretrained"
        )
    return table
