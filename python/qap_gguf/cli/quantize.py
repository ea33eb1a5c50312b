"""`qap-gguf quantize`: a GGUF language model in another type, with an importance matrix or without."""

from __future__ import annotations

from pathlib import Path

import click

from qap_gguf.cli.common import output_options, print_json
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.progress import progress_bar, stops_cleanly


@click.command(cls=GroupedCommand, short_help="Quantize a language model in GGUF.")
@click.argument("source", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "kind",
    default="Q4_K_M",
    show_default=True,
    metavar="TYPE",
    help="Type of the weights: Q4_0, Q4_K_M, Q3_K_S, IQ2_XS, ...",
)
@click.option(
    "--imatrix",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Importance matrix of this model, by `qap-gguf imatrix` or llama-imatrix.",
)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@output_options
def quantize(source: Path, out: Path, kind: str, imatrix: Path | None, force: bool, as_json: bool) -> None:
    """Quantize the language model MODEL (F32, F16 or BF16) to the file OUT, by llama.cpp's own quantizer.

    \b
    Examples:
      qap-gguf quantize model-F16.gguf model-Q4_K_M.gguf
      qap-gguf quantize model-F16.gguf model-IQ2_XS.gguf --type IQ2_XS --imatrix imatrix.gguf
    """
    from qap_gguf.convert import quantize as run
    from qap_gguf.files.gguf import check_language
    from qap_gguf.files.trial import check_trial

    check_language(source, memory=False)
    check_trial(None, source)
    with stops_cleanly(), progress_bar() as report:
        written = run(source, out, type=kind, imatrix=imatrix, force=force, progress=report)
    if as_json:
        print_json({"model": written, "type": kind, "imatrix": imatrix})
    else:
        click.echo(written)
