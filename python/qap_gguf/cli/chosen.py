"""What a command works with where its options leave something open: the pair of files, and how pictures are pruned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qap_gguf.cli.common import over_file_defaults
from qap_gguf.config import PruneConfig


def chosen_pair(model: Path | None, mmproj: Path | None) -> tuple[Path, Path]:
    """The language model and the mmproj; the packaged ones where none are named (see ``check_model_pair``)."""
    import qap_gguf as qap

    if model is None or mmproj is None:
        packaged = qap.packaged_model()
        return packaged.model, packaged.mmproj
    return model, mmproj


def chosen_config(mmproj: Path, config: PruneConfig, prune: Mapping[str, Any]) -> PruneConfig:
    """The options over what holds without them: the process default, or what the mmproj file says."""
    from qap_gguf.defaults import get_default
    from qap_gguf.files.gguf import read_gguf

    usual = get_default() or PruneConfig.from_metadata(read_gguf(mmproj).metadata)
    return over_file_defaults(usual, config, prune)


def cache_mb_option(function: click.decorators.FC) -> click.decorators.FC:
    """Add --cache-mb; the command takes it as `cache_mb`."""
    return click.option(
        "--cache-mb",
        type=click.IntRange(min=0),
        default=256,
        show_default=True,
        help="Encoded images kept in memory, in MiB.",
    )(function)
