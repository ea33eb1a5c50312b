"""The ways of `qap-gguf convert` that take GGUF files instead of a checkpoint: --annotate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qap_gguf.cli.common import make_config, over_file_defaults, print_json, prune_given
from qap_gguf.config import PruneConfig


def refuse_options(way: str, *names: str) -> None:
    """Options that mean nothing for this way of the command are a usage error, not passed over."""
    ctx = click.get_current_context()
    for name in names:
        if ctx.get_parameter_source(name) != ParameterSource.DEFAULT:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} has no meaning with {way}; drop one of them")


def annotate_file(source: Path, out: Path, prune: Mapping[str, Any], *, force: bool, as_json: bool) -> None:
    """Copy an mmproj file with its defaults changed by the options, or without defaults for --dense."""
    given = prune_given(prune)
    if not given and not prune.get("dense"):
        raise click.UsageError("--annotate changes pruning defaults: give --keep-ratio or another, or --dense for none")

    import qap_gguf as qap
    from qap_gguf.files import read_gguf

    config = None
    if given:
        config = make_config(given)
        config = over_file_defaults(PruneConfig.from_metadata(read_gguf(source).metadata), config, prune)
    written = qap.annotate(source, out, config, force=force)
    if as_json:
        print_json({"mmproj": written, "metadata": None if config is None else config.to_metadata()})
    else:
        click.echo(written)
