"""Weights that learn to be rounded: a pass uses them in Q4_0, their gradients go on as if it had not."""

from __future__ import annotations

from typing import Any, Final

import gguf
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

_TYPE: Final = gguf.GGMLQuantizationType.Q4_0


def q4_0(weight: Any) -> Any:
    """What ggml's Q4_0 makes of a weight, float32 of the same shape; the last dimension a multiple of 32."""
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), _TYPE), _TYPE))


def round_as_it_learns(part: Any) -> None:
    """From now on each nn.Linear of `part` multiplies by its weights in Q4_0; the weights stay as they are."""

    def rounded(linear: Any) -> Any:
        def forward(x: Any) -> Any:
            weight = linear.weight
            return F.linear(x, weight + (q4_0(weight.detach()) - weight.detach()), linear.bias)

        return forward

    for module in part.modules():
        if isinstance(module, nn.Linear):
            module.forward = rounded(module)
