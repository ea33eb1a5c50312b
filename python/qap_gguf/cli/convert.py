"""`qap-gguf convert`: from a Hugging Face checkpoint to the two GGUF files that llama.cpp runs.

Its ways that take GGUF files (--annotate, --check) are in convert_files.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qap_gguf.cli.common import (
    make_config,
    note,
    output_options,
    print_json,
    prune_given,
    prune_options,
)
from qap_gguf.cli.convert_files import (
    annotate_file,
    check_given,
    is_given,
    measuring,
    refuse_options,
    relabel_file,
    requantize_file,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.progress import progress_bar, stops_cleanly


def _arguments(paths: tuple[str, ...], names: tuple[str, ...]) -> tuple[Path, ...]:
    """As many paths as there are names, or a usage error that says which is missing."""
    if len(paths) < len(names):
        raise click.UsageError(f"Missing argument '{names[len(paths)]}'.")
    if len(paths) > len(names):
        raise click.UsageError(f"expected {' and '.join(names)}, got {paths[len(names)]} too; put odd names in quotes")
    return tuple(map(Path, paths))


@click.command(
    cls=GroupedCommand, short_help="Turn a checkpoint into GGUF files; change the defaults that a file carries."
)
@click.argument("paths", metavar="DIR OUT", nargs=-1, type=click.Path())  # no Path: it would spoil an address
@click.option(
    "--quantize",
    default="Q4_K_M",
    show_default=True,
    metavar="TYPE",
    help="Type of the language model's weights: Q4_0, Q4_K_M, Q8_0, F16, ...",
)
@click.option(
    "--mmproj-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0", "iq4_nl"]),
    default="f16",
    show_default=True,
    help="Type of the image encoder's matrices; the last two for an mmproj file as DIR.",
)
@click.option("--name", help="Name of the model in the files. [default: the folder's name]")
@click.option(
    "--vision-tower",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The CLIP or SigLIP that a checkpoint in the layout of LLaVA's authors names as mm_vision_tower.",
)
@click.option(
    "--clip-text",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A CLIPModel checkpoint whose text tower goes into the mmproj, for --semantic clip_text.",
)
@click.option(
    "--imatrix",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Importance matrix of `qap-gguf imatrix` or llama-imatrix for the language model, which the quantizer then "
    "minds; and where --error model gets its weights from.",
)
@click.option(
    "--imatrix-data",
    metavar="DATA",
    type=click.Path(path_type=Path),
    help="Measure the importance matrix first, on these questions (see `qap-gguf imatrix`), into OUT/imatrix.gguf.",
)
@click.option("--annotate", is_flag=True, help="Copy an mmproj file with other pruning defaults; see above.")
@click.option("--check", is_flag=True, help="Say what GGUF files are, and whether they fit together; see above.")
@click.option("--allow-http", is_flag=True, help="With --check: addresses may be plain http, not only https.")
@click.option(
    "--keep-positions/--no-keep-positions",
    default=None,
    help="Whether kept image tokens can stay at their own positions; see above. [default: where that can be]",
)
@click.option("--undo", is_flag=True, help="With --keep-positions and a GGUF file: the file that it was made from.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@prune_options(without=("seed",))
@output_options
def convert(
    paths: tuple[str, ...],
    quantize: str,
    mmproj_type: str,
    name: str | None,
    vision_tower: Path | None,
    clip_text: Path | None,
    imatrix: Path | None,
    imatrix_data: Path | None,
    annotate: bool,
    check: bool,
    allow_http: bool,
    keep_positions: bool | None,
    undo: bool,
    force: bool,
    as_json: bool,
    **prune: Any,
) -> None:
    """Convert the checkpoint in DIR to an mmproj and a language model in the folder OUT.

    DIR is a Hugging Face checkpoint: config.json, weights and the tokenizer; or its id on the hub, owner/name or
    owner/name@revision (pip install huggingface_hub). Models that are no LLaVA (Qwen-VL, Gemma 3, SmolVLM, InternVL,
    Pixtral, ...) go through llama.cpp's own converter (pip install torch transformers sentencepiece). Prune options, if
    any is given, are stored in the mmproj as the defaults of whoever loads it; without one nothing is stored. With
    --imatrix-data the float model reads those questions before it is quantized, with the pictures pruned by these
    options, or not at all without one.

    With --annotate the arguments are an mmproj file and the file OUT to write: a copy, byte for byte, but with the
    defaults that the file has, changed by the prune options given, or with none for --dense. With --imatrix the copy
    also gets what --error model needs: how important each channel of a token is to the language model.

    The language model is written so that kept image tokens can stay at their own positions, where that can be.
    --keep-positions makes it an error where it cannot. Stock llama.cpp misplaces the images of such a file and says
    nothing; --no-keep-positions writes one for both. With --keep-positions DIR may also be a GGUF file, of any
    quantization, and OUT the file to write; --undo gives the original back.

    With --mmproj-type DIR may also be an mmproj file, and OUT the file to write: a copy with the matrices of its image
    encoder in that type.

    With --check the arguments are GGUF files: what each is, whether every mmproj fits every language model, which
    pruning the images support, what defaults a file carries, and where stock llama.cpp runs an encoder otherwise than
    it was trained. An argument may also be the https address of a file, or an id of the hub, owner/name or
    owner/name:QUANT, for the pair that --hf would fetch; of those only the headers are fetched. Exit status 1 when a
    file cannot be used or a pair does not fit.

    \b
    Examples:
      qap-gguf convert llava-1.5-7b-hf/ out/ --quantize Q4_K_M --n-keep 64
      qap-gguf convert llava-hf/llava-v1.6-mistral-7b-hf out/
      qap-gguf convert --annotate mmproj.gguf mmproj-pruning.gguf --keep-ratio 0.25
      qap-gguf convert --annotate mmproj.gguf mmproj-model.gguf --error model --imatrix imatrix.gguf
      qap-gguf convert --keep-positions model-Q4_K_M.gguf model-Q4_K_M-keep.gguf
      qap-gguf convert mmproj-f16.gguf mmproj-q8_0.gguf --mmproj-type q8_0
      qap-gguf convert --check mmproj.gguf model-Q4_K_M.gguf
      qap-gguf convert --check ggml-org/gemma-3-4b-it-GGUF
    """
    given = prune_given(prune)
    if check:
        refuse_options(
            "--check",
            "annotate",
            "quantize",
            "mmproj_type",
            "name",
            "vision_tower",
            "clip_text",
            "imatrix",
            "imatrix_data",
            "keep_positions",
            "undo",
            "force",
            *prune,
        )
        check_given(paths, allow_http=allow_http, as_json=as_json)
        return
    if allow_http:
        raise click.UsageError("--allow-http has a meaning with --check only; drop it, or give both")
    making = ("quantize", "mmproj_type", "name", "vision_tower", "clip_text", "imatrix", "imatrix_data")
    if annotate:
        refuse_options("--annotate", *(name for name in making if name != "imatrix"), "keep_positions", "undo")
        source, out = _arguments(paths, ("MMPROJ", "OUT"))
        annotate_file(source, out, prune, imatrix=imatrix, force=force, as_json=as_json)
        return
    source, out = _arguments(paths, ("DIR", "OUT"))
    if undo or (keep_positions and source.is_file()):
        if not keep_positions:
            raise click.UsageError("--undo has a meaning with --keep-positions only; give both")
        refuse_options("--keep-positions and a GGUF file", *making, *prune)
        relabel_file(source, out, undo=undo, force=force, as_json=as_json)
        return
    if is_given("mmproj_type") and source.is_file():
        others = [option for option in making if option != "mmproj_type"]
        refuse_options("--mmproj-type and an mmproj file", *others, "keep_positions", *prune)
        requantize_file(source, out, mmproj_type, force=force, as_json=as_json)
        return
    config = make_config(given) if given else None
    if imatrix is not None and imatrix_data is not None:
        raise click.UsageError("--imatrix and --imatrix-data exclude each other; give one of them")

    import qap_gguf as qap

    with stops_cleanly(), progress_bar() as report:
        result = qap.convert(
            source,
            out,
            quantize=quantize,
            mmproj_type=mmproj_type,
            name=name,
            prune=config,
            vision_tower=vision_tower,
            clip_text=clip_text,
            imatrix=imatrix
            if imatrix_data is None
            else measuring(imatrix_data, out / "imatrix.gguf", config, force=force),
            keep_positions=keep_positions,
            force=force,
            progress=report,
        )
    if as_json:
        stored = None if config is None else config.to_metadata()
        print_json(
            {"mmproj": result.mmproj, "model": result.model, "quantize": quantize, "notes": result.notes}
            | {"metadata": stored}
        )
    else:
        for line in result.notes:
            note(line)
        click.echo(result.mmproj)
        click.echo(result.model)
