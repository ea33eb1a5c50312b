"""`qap-gguf convert`: from a Hugging Face checkpoint to the two GGUF files that llama.cpp runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from qap_gguf.cli.common import (
    make_config,
    on_terminal,
    output_options,
    print_json,
    prune_given,
    prune_options,
)

Report = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[Report | None]:
    """Yield a function (done, total, what) that moves a bar on stderr, or None where stderr is no terminal."""
    if not on_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)

        def report(done: int, total: int, what: str) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield report


@click.command(short_help="Turn a Hugging Face checkpoint into GGUF files.")
@click.argument("source", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--quantize",
    default="Q4_K_M",
    show_default=True,
    metavar="TYPE",
    help="Type of the language model's weights: Q4_0, Q4_K_M, Q8_0, F16, ...",
)
@click.option(
    "--mmproj-type",
    type=click.Choice(["f32", "f16"]),
    default="f16",
    show_default=True,
    help="Type of the image encoder's weights.",
)
@click.option("--name", help="Name of the model in the files. [default: the folder's name]")
@click.option(
    "--clip-text",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A CLIPModel checkpoint whose text tower goes into the mmproj, for --semantic clip_text.",
)
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@prune_options(without=("seed", "dense"))
@output_options
def convert(
    source: Path,
    out: Path,
    quantize: str,
    mmproj_type: str,
    name: str | None,
    clip_text: Path | None,
    force: bool,
    as_json: bool,
    **prune: Any,
) -> None:
    """Convert the checkpoint in DIR to an mmproj and a language model in the folder OUT.

    DIR is a Hugging Face checkpoint of LLaVA-1.5's kind: config.json, *.safetensors and the tokenizer. Prune options,
    if any is given, are stored in the mmproj as the defaults of whoever loads it; without one nothing is stored.

    \b
    Example:
      qap-gguf convert llava-1.5-7b-hf/ out/ --quantize Q4_K_M --n-keep 64
    """
    given = prune_given(prune)
    config = make_config(given) if given else None

    import qap_gguf as qap

    with progress_bar() as report:
        result = qap.convert(
            source,
            out,
            quantize=quantize,
            mmproj_type=mmproj_type,
            name=name,
            prune=config,
            clip_text=clip_text,
            force=force,
            progress=report,
        )
    if as_json:
        stored = None if config is None else config.to_metadata()
        print_json({"mmproj": result.mmproj, "model": result.model, "quantize": quantize, "metadata": stored})
    else:
        click.echo(result.mmproj)
        click.echo(result.model)
