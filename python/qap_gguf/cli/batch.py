"""`qap-gguf batch`: a question about each of many pictures, or a table of questions, into a file (docs/batch.md).

Rows go to the file of --out, one by one; a summary to stdout with --json, else notes to stderr.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qap_gguf.cli.chosen import cache_mb_option, chosen_config, chosen_pair
from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    model_options,
    note,
    output_options,
    print_json,
    prune_config,
    prune_options,
    sampler_seed,
    warn,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.output import counter_bar
from qap_gguf.cli.pictures import allow_urls_option
from qap_gguf.cli.places import keeping
from qap_gguf.cli.progress import stops_cleanly
from qap_gguf.errors import ConfigError

if TYPE_CHECKING:
    from qap_gguf.batch.api import BatchModel
    from qap_gguf.batch.inputs import Input
    from qap_gguf.batch.output import Output


def _parallel(_ctx: click.Context, _param: click.Parameter, value: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= 64:
        return int(value)
    raise click.BadParameter(f"expected auto or a number from 1 to 64, got {value!r}")


def _schema(path: Path | None) -> dict[str, Any] | None:
    """The field of a request for a file with a JSON schema."""
    if path is None:
        return None
    from qap_gguf.files.regular import read_text

    try:
        schema = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"--schema: expected a file with a JSON schema, got {path} ({err}); check it") from err
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@click.command(cls=GroupedCommand, short_help="Ask about many pictures, several at a time.")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Rows go here: .jsonl or .csv."
)
@click.option("-p", "--prompt", help="Question. Rows of a table may have their own.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer, in tokens."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Randomness of the answer; 0 always takes the likeliest token.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends an answer. Repeatable.")
@click.option(
    "--schema", type=click.Path(path_type=Path), metavar="FILE", help="Answers are JSON of this schema (a JSON file)."
)
@click.option(
    "--parallel",
    default="auto",
    show_default=True,
    callback=_parallel,
    metavar="N",
    help="Answers side by side, each with a context of --ctx tokens; auto is what fits the memory, 16 at most.",
)
@click.option(
    "--every", type=click.FloatRange(0.01, 3600), metavar="SECONDS", help="Take a frame of each video every so often."
)
@allow_urls_option
@click.option(
    "--resume/--restart", default=True, show_default=True, help="Go on with the rows of --out, or begin it anew."
)
@click.option("--retry-errors", is_flag=True, help="Ask the rows of --out that have an error again.")
@click.option("--chat-format", metavar="NAME", help="A chat format by name. [default: the template in the GGUF]")
@click.option(
    "--tries",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="How often a row is asked where llama-server ends meanwhile.",
)
@cache_mb_option
@model_options()
@prune_options()
@output_options
def batch(
    inputs: tuple[str, ...],
    out: Path,
    prompt: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    stop: tuple[str, ...],
    schema: Path | None,
    parallel: int | Literal["auto"],
    every: float | None,
    allow_urls: bool,
    resume: bool,
    retry_errors: bool,
    chat_format: str | None,
    tries: int,
    cache_mb: int,
    model: Path | None,
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    ctx: int,
    kv: str | None,
    as_json: bool,
    **prune: Any,
) -> None:
    """Ask about many pictures, several at a time, and write a row for each.

    INPUT is a folder (with the folders in it), a pattern, a picture, a video with --every, a .txt list of paths, or a
    table: JSON lines, CSV or Parquet with a column image and, if you like, prompt, id and settings; or a file of
    OpenAI's batch API. A picture that cannot be read is a row with an error. However it was stopped, the same command
    goes on where it was.

    \b
    Examples:
      qap-gguf batch photos/ -o captions.jsonl -p "Describe the picture in one sentence."
      qap-gguf batch rows.jsonl -o answers.csv -m model.gguf --mmproj mmproj.gguf --keep-ratio 0.125 --ctx 512
      qap-gguf batch openai-batch.jsonl -o results.jsonl
    """
    check_model_pair(model, mmproj)
    config = prune_config(prune)
    if prompt is not None and not prompt.strip():
        raise click.UsageError("-p/--prompt is empty; write a question")

    from qap_gguf.batch.api import BatchModel
    from qap_gguf.batch.inputs import find_input, n_unknown
    from qap_gguf.batch.output import Output, check_form
    from qap_gguf.files.journal import fingerprint
    from qap_gguf.vision.resize import default_resize

    found = find_input(inputs, every)
    check_form(out, found.is_openai)
    if found.is_openai and (prompt is not None or system is not None):
        raise click.UsageError("the rows of OpenAI's batch files have their own messages; drop --prompt and --system")
    if found.unused:
        note(f"columns that mean nothing here: {', '.join(found.unused)}")
    model, mmproj = chosen_pair(model, mmproj)
    model = keeping(model, prune)
    if config is not None:
        config = chosen_config(mmproj, config, prune)
    response_format, seed = _schema(schema), sampler_seed(prune.get("seed") or 0)
    settings: dict[str, Any] = {
        "input": [word if "://" in word else str(Path(word).absolute()) for word in inputs],
        "model": fingerprint(model), "mmproj": fingerprint(mmproj), "prompt": prompt, "system": system,
        "prune": None if config is None else config.to_dict(), "max_tokens": max_tokens, "temperature": temperature,
        "seed": seed, "stop": stop, "schema": response_format, "ctx": ctx, "kv": kv, "chat_format": chat_format,
        "every": every, "resize": default_resize(), "max_image_tokens": os.environ.get("QAP_MAX_IMAGE_TOKENS"),
        "force_family": os.environ.get("QAP_FORCE_FAMILY"),
    }  # fmt: skip
    with (
        stops_cleanly(),
        Output(out, settings, is_openai=found.is_openai, restart=not resume, retry_errors=retry_errors) as output,
    ):
        n_before = len(output.known)
        n_left = found.total if not n_before else n_unknown(found, output.known)
        if n_before:
            note(f"{found.total - n_left} of {found.total} rows are known from {out}")
        try:
            started = time.monotonic()
            summary: Mapping[str, Any] = {}
            if n_left:
                with BatchModel(
                    model, mmproj, prompt=prompt, system=system, prune=config, parallel=parallel, n_ctx=ctx,
                    n_threads=threads, max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop,
                    response_format=response_format, device=device, model_device=model_device, kv=kv,
                    chat_format=chat_format, allow_urls=allow_urls, cache_mb=cache_mb, tries=tries, verbose=is_debug(),
                    n_rows=n_left,
                ) as asked:  # fmt: skip
                    summary = _ask(asked, found, n_left, output)
        except BaseException as err:
            if isinstance(err, KeyboardInterrupt) or len(output.known) > n_before:
                warn(f"stopped; {output.count()} rows are in {out}: run the same command again to go on")
            raise
        seconds = time.monotonic() - started
        n_new = len(output.known) - n_before
        told = {
            "out": out, "rows": len(output.known), "known": found.total - n_left, "errors": output.n_errors,
            "seconds": round(seconds, 3), "rows_per_minute": round(60 * n_new / seconds, 1) if n_new else 0.0,
            **summary,
        }  # fmt: skip
    note(
        f"{told['rows']} rows in {out}, {told['errors']} of them with an error; {n_new} new ones in {seconds:.1f} s"
        + (f", {told['rows_per_minute']:g} a minute" if n_new else "")
    )
    if as_json:
        print_json(told)


def _ask(asked: BatchModel, found: Input, n_left: int, output: Output) -> Mapping[str, Any]:
    """Ask the rows that are not known, and write their results; gives what the summary says of them."""
    if asked.numbers:
        note(
            f"{asked.n_parallel} answers side by side: {asked.numbers['cell'] / 1024:.0f} KiB x "
            f"{asked.numbers['n_ctx']} cells each, {asked.numbers['free'] / 1e9:.1f} GB free"
        )
    longest, before = 0, found.total - n_left
    results = asked.run(found.read(), known=frozenset(output.known))
    with counter_bar("rows", start=before, rate=True) as report:
        for done, result in enumerate(results, start=before + 1):
            output.add(result)
            longest = max(longest, result.prompt_tokens + result.tokens)
            if report is not None:
                report(done, found.total)
    return {"parallel": asked.n_parallel, "longest": longest, "restarts": asked.engine.n_restarts}
