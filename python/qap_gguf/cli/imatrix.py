"""`qap-gguf imatrix`: measure an importance matrix on pictures, or merge files. The logic is in eval/imatrix.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qap_gguf.cli.chosen import chosen_config, chosen_pair
from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    make_config,
    model_options,
    output_options,
    print_json,
    prune_given,
    prune_options,
    warn,
)
from qap_gguf.cli.convert_files import refuse_options
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.output import counter_bar
from qap_gguf.cli.places import keeping
from qap_gguf.config import PruneConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qap_gguf.defaults import Unset


def parse_weights(_ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, float]:
    """KIND=W, several times, as a dictionary."""
    from qap_gguf.errors import ConfigError
    from qap_gguf.eval.imatrix import check_weights

    found: dict[str, float] = {}
    for word in value:
        kind, _, weight = word.partition("=")
        try:
            found[kind] = float(weight)
        except ValueError:
            raise click.BadParameter(f"expected KIND=NUMBER such as image=0.5, got {word!r}", param=param) from None
    try:
        check_weights(found)
    except ConfigError as err:
        raise click.BadParameter(str(err), param=param) from err
    return found


def measured_config(mmproj: Path, prune: Mapping[str, Any]) -> PruneConfig | Unset | None:
    """How the pictures are pruned: the options over the file's defaults; unset where none is given."""
    from qap_gguf.defaults import UNSET
    from qap_gguf.files.gguf import check_mmproj

    given = prune_given(prune)
    if prune.get("dense"):
        return None
    if not given:
        return UNSET
    check_mmproj(mmproj, memory=False)
    return chosen_config(mmproj, make_config(given), prune)


@click.command(cls=GroupedCommand, short_help="Measure an importance matrix on pictures, for the quantizer.")
@click.argument("paths", metavar="DATA", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The imatrix file to write."
)
@click.option("--text", is_flag=True, help="DATA is a plain text, read in chunks as llama-imatrix does.")
@click.option("--merge", is_flag=True, help="DATA are imatrix files: add them up. Nothing is measured.")
@click.option(
    "--weight",
    multiple=True,
    callback=parse_weights,
    metavar="KIND=W",
    help="How much a row of image, text or answer counts, such as image=0.5. Repeatable.  [default: 1]",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read the first N pictures or chunks only.")
@click.option(
    "--chunk",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of a chunk of text.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE, and begin anew where its state is of another measurement.")
@model_options()
@prune_options(without=("seed", "merge"))  # --merge is ours here
@output_options
def imatrix(
    paths: tuple[Path, ...],
    out: Path,
    text: bool,
    merge: bool,
    weight: dict[str, float],
    limit: int | None,
    chunk: int,
    force: bool,
    model: Path | None,
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    kv: str | None,
    ctx: int,
    as_json: bool,
    **prune: Any,
) -> None:
    """Measure how strongly each channel of a language model's matrices is used, on pictures with questions.

    DATA is a file of questions as `eval` reads it; where a line has an answer, it is read after the question. Pictures
    are pruned as the options say: those are the tokens that the quantized model will read. FILE has llama-imatrix's
    format, for `quantize`, `convert --imatrix` and llama-quantize. Beside it stands FILE.state: the same command goes
    on where it was stopped, and with another --weight or a larger --limit nothing is measured twice.

    Measure the float model (F16 or BF16), not one that is quantized already.

    \b
    Examples:
      qap-gguf imatrix questions.jsonl -m model-F16.gguf --mmproj mmproj-f16.gguf --keep-ratio 0.125 -o imatrix.gguf
      qap-gguf quantize model-F16.gguf model-Q3_K_S.gguf --type Q3_K_S --imatrix imatrix.gguf
      qap-gguf imatrix --merge a.gguf b.gguf -o both.gguf
      qap-gguf imatrix --text wiki.txt -m model-F16.gguf -o text.gguf
    """
    if merge:
        refuse_options("--merge", "text", "weight", "limit", "chunk", "model", "mmproj", "kv", "threads", "ctx", *prune)
        from qap_gguf.convert import merge_imatrix

        merged = merge_imatrix(paths, out, force=force)
        if as_json:
            print_json({"imatrix": out, "entries": len(merged.entries), "chunks": merged.n_chunks})
        else:
            click.echo(out)
        return
    if len(paths) != 1:
        raise click.UsageError(f"expected one file of DATA, got {len(paths)}; --merge takes several imatrix files")
    if text:
        refuse_options("--text", "mmproj", *prune)
        if model is None:
            raise click.UsageError("--text needs -m/--model; give the float model")
    else:
        check_model_pair(model, mmproj)

    from qap_gguf.eval import measure_imatrix

    if model is None:
        model, mmproj = chosen_pair(model, mmproj)
    config = None if mmproj is None else measured_config(mmproj, prune)
    with counter_bar("pieces") as report:
        try:
            found = measure_imatrix(
                paths[0], out, model=keeping(model, prune), mmproj=mmproj, text=text, prune=config, weights=weight,
                limit=limit, chunk=chunk, kv=kv, n_ctx=ctx, n_threads=threads, device=device, model_device=model_device,
                force=force, check="child", progress=report, verbose=is_debug(),
            )  # fmt: skip
        except KeyboardInterrupt:
            warn(f"stopped; {out}.state holds what was measured: run the same command again to go on")
            raise
    if as_json:
        print_json(
            {"imatrix": found.path, "entries": found.n_entries, "rows": dict(found.rows), "pieces": found.n_pieces}
            | {"known": found.n_known, "prune": None if found.prune is None else found.prune.to_dict()}
            | {"seconds": found.seconds}
        )
        return
    rows = ", ".join(f"{n} {kind}" for kind, n in found.rows.items())
    known = f", {found.n_known} of them measured before" if found.n_known else ""
    click.echo(f"{found.path}: {found.n_entries} matrices, rows: {rows} ({found.n_pieces} pieces{known})")
