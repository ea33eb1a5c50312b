"""The small trained model that comes with the package, with one sample picture (see models/tiny_llava/README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qap_gguf.errors import ModelFileError


@dataclass(frozen=True)
class PackagedModel:
    """Paths of the packaged files.

    Attributes:
        mmproj: vision encoder and projector, f16.
        model: language model, Q4_0; relabelled, so that kept image tokens stay at their own positions.
        sample: a picture of 192 x 192 pixels that the model can be asked about.
    """

    mmproj: Path
    model: Path
    sample: Path


def packaged_model() -> PackagedModel:
    """The packaged model: 144 tokens for an image, pictures of emoji in a 4 x 4 grid, and nothing else.

    Raises:
        ModelFileError: the installation lacks a file.

    Example:
        >>> import qap_gguf as qap
        >>> qap.packaged_model().sample.name
        'sample.png'
    """
    folder = Path(__file__).resolve().parents[1] / "models" / "tiny_llava"
    files = PackagedModel(folder / "mmproj-f16.gguf", folder / "tiny-llava-Q4_0.gguf", folder / "sample.png")
    for path in (files.mmproj, files.model, files.sample):
        if not path.is_file():
            raise ModelFileError(f"expected the packaged file {path}, found none; install qap_gguf again")
    return files
