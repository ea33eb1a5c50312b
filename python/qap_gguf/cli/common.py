"""What the subcommands share: the prune options, the model options, and the ways to write to a stream.

One word per idea: an option here means the same in every subcommand. Data goes to stdout,
notes to stderr.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import click

from qap_gguf.arguments import MOST_IMAGE_TOKENS
from qap_gguf.cli.pixel_options import PIXEL_OPTIONS
from qap_gguf.config import ERRORS, MERGES, OUTLIERS, POSITIONS, SELECTORS, SEMANTICS, PruneConfig
from qap_gguf.errors import ConfigError
from qap_gguf.language.kv_types import KV_TYPES
from qap_gguf.vision.resize import RESIZES, set_resize

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class State:
    """What one run of the command remembers from its options, for the handling of errors."""

    debug: bool = False
    quiet: bool = False


def parse_alpha(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """A number or the word "dynamic", or several of them; the range is checked by PruneConfig."""
    if isinstance(value, tuple):
        return tuple(parse_alpha(ctx, param, one) for one in value)
    if value is None or value == "dynamic":
        return value
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f'expected a number in 0..1 or "dynamic", got {value!r}', param=param) from None


_DEFAULT: Final = PruneConfig()


def default_of(name: str) -> str:
    """The words that end the help of a prune option: its default, as the native library has it."""
    return f"  [default: {getattr(_DEFAULT, name)}]"


_PRUNE: Final[dict[str, Callable[[Any], Any]]] = {
    "n_keep": click.option(
        "--n-keep", type=click.IntRange(min=1), metavar="K", help="Keep K tokens of each image, or all if it has fewer."
    ),
    "keep_ratio": click.option(
        "--keep-ratio",
        type=float,
        metavar="R",
        help="Keep this part of the tokens, 0 < R <= 1." + default_of("keep_ratio"),
    ),
    "alpha": click.option(
        "--alpha",
        callback=parse_alpha,
        metavar="A",
        help='Weight of the semantic score, 0..1; the rest goes to the sensitivity to quantization. Or "dynamic".'
        + default_of("alpha"),
    ),
    "error": click.option(
        "--error",
        type=click.Choice(ERRORS),
        metavar="Q",
        help="Quantizer whose error is measured: int2 to int8, or a ggml type such as q4_0 or q4_K; model is int4 with "
        "each channel as important as it is to the language model (see convert --annotate)." + default_of("error"),
    ),
    "group_size": click.option(
        "--group-size",
        type=click.IntRange(min=1),
        metavar="G",
        help="Channels that share one scale, for int2 to int8." + default_of("group_size"),
    ),
    "outlier": click.option(
        "--outlier",
        type=click.Choice(OUTLIERS),
        help="How the outliers of a token are measured." + default_of("outlier"),
    ),
    "outlier_weight": click.option(
        "--outlier-weight",
        type=float,
        metavar="W",
        help="Weight of outliers against quantization error, 0..1." + default_of("outlier_weight"),
    ),
    "semantic": click.option(
        "--semantic",
        type=click.Choice(SEMANTICS),
        help="Source of the semantic score: attention of the class token (cls) or of all patches (attention), likeness "
        "to the prompt in the language model (text) or in CLIP (clip_text). auto takes the first that there is."
        + default_of("semantic"),
    ),
    "select": click.option(
        "--select",
        type=click.Choice(SELECTORS),
        help="How tokens are chosen: good and different ones (dpp), the best (topk), different ones (divprune), those "
        "that stand for most of the picture (coverage), or by no score at all." + default_of("select"),
    ),
    "positions": click.option(
        "--positions", type=click.Choice(POSITIONS), help="Positions of the kept tokens." + default_of("positions")
    ),
    "merge": click.option(
        "--merge", type=click.Choice(MERGES), help="average folds dropped tokens into kept ones." + default_of("merge")
    ),
    "encoder_keep": click.option(
        "--encoder-keep",
        type=float,
        metavar="R",
        help="Drop all but this part of the tokens inside the image encoder already, 0 < R <= 1; 1 drops none."
        + default_of("encoder_keep"),
    ),
    "encoder_layer": click.option(
        "--encoder-layer",
        type=click.IntRange(min=1),
        metavar="L",
        help="Layers of the image encoder that see all patches, for --encoder-keep. [default: a quarter of them]",
    ),
    **PIXEL_OPTIONS,
    "seed": click.option(
        "--seed",
        type=click.IntRange(0, 2**64 - 1),
        metavar="N",
        help="Seed of everything random: --select random, sampling, resampling." + default_of("seed"),
    ),
    "dense": click.option("--dense", "--no-prune", "dense", is_flag=True, help="Keep every token: no pruning at all."),
}


def prune_options(*, without: Collection[str] = ()) -> Callable[[F], F]:
    """Add the common prune options, except those in `without`; the command takes them as ``**prune``.

    None of them has a default here, so that the command sees which were given.
    """

    def decorate(function: F) -> F:
        for name, option in reversed(list(_PRUNE.items())):
            if name not in without:
                function = option(function)
        return function

    return decorate


def prune_given(prune: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prune options that were on the command line; --seed and --dense are not among them.

    Raises:
        click.UsageError: options that contradict each other.
    """
    given = {name: value for name, value in prune.items() if value is not None and name not in ("dense", "seed")}
    if "n_keep" in given and "keep_ratio" in given:
        raise click.UsageError("--n-keep and --keep-ratio exclude each other; give one of them")
    if prune.get("dense") and given:
        first = "--" + next(iter(given)).replace("_", "-")
        raise click.UsageError(f"--dense keeps every token, so {first} has no meaning; drop one of them")
    return given


def prune_config(prune: Mapping[str, Any]) -> PruneConfig | None:
    """Turn the prune options into a config; None means: do not prune.

    Raises:
        click.UsageError: options that contradict each other, or a value outside its range.
    """
    given = prune_given(prune)
    if prune.get("dense"):
        return None
    if prune.get("seed") is not None:
        given["seed"] = prune["seed"]
    return make_config(given)


def over_file_defaults(file_config: PruneConfig | None, config: PruneConfig, prune: Mapping[str, Any]) -> PruneConfig:
    """Layer the settings: the options of the command line, over the mmproj file's own defaults, over ours.

    Args:
        file_config: VisionModel.file_config.
        config: what :func:`prune_config` made of the options.
    """
    return config if file_config is None else file_config.replace(**prune_given(prune), seed=config.seed)


def make_config(values: Mapping[str, Any]) -> PruneConfig:
    """PruneConfig of options: a value outside its range is a usage error here."""
    try:
        return PruneConfig.from_dict(values)
    except ConfigError as err:
        raise click.UsageError(str(err)) from err


def sampler_seed(seed: int) -> int:
    """Return the part of a 64-bit seed that VisionModel takes for sampling (31 bits)."""
    return seed % 2**31


def _apply_resize(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """For whatever this run of the command loads."""
    if value is not None:
        set_resize(value)
        ctx.call_on_close(lambda: set_resize("auto"))


def _set_variable(name: str, ctx: click.Context, _param: click.Parameter, value: int | None) -> None:
    """For whatever this run of the command loads, in processes of its own too; None and False leave it."""
    if value:
        before = os.environ.get(name)
        os.environ[name] = str(int(value))
        ctx.call_on_close(lambda: os.environ.pop(name, None) if before is None else os.environ.update({name: before}))


def _with_hub(function: F, multiple: bool) -> F:
    """Let a command take --hf: what it names becomes its `model` and `mmproj`."""

    @functools.wraps(function)
    def command(*args: Any, hf: str | None, **settings: Any) -> Any:
        if hf is not None:
            if settings["model"] or settings["mmproj"]:
                raise click.UsageError("--hf brings the model and its mmproj; drop -m/--model and --mmproj")
            from qap_gguf.files.hub import fetch_pair, split_id

            repo, quant = split_id(hf)
            found = fetch_pair(repo, quant=quant)
            settings |= {"model": (found.model,) if multiple else found.model, "mmproj": found.mmproj}
        return function(*args, **settings)

    return cast("F", command)


def _model_options(multiple: bool) -> list[Callable[[Any], Any]]:
    more = " Repeatable: all of one image encoder." if multiple else ""
    return [
        click.option(
            "-m",
            "--model",
            type=click.Path(path_type=Path),
            multiple=multiple,
            metavar="GGUF",
            help=f"Language model.{more} [default: the packaged one]",
        ),
        click.option(
            "--mmproj",
            type=click.Path(path_type=Path),
            metavar="GGUF",
            help="Image encoder and projector that belong to the model. [default: the packaged one]",
        ),
        click.option(
            "--hf",
            metavar="REPO[:QUANT]",
            help="Take both from this repository of the Hugging Face hub.  [default quantization: Q4_K_M]",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            metavar="N",
            help="CPU threads. [default: QAP_THREADS of the environment, or one for each physical core]",
        ),
        click.option(
            "--device",
            metavar="NAME",
            help="Device to run on: cpu, cuda0, metal, vulkan0, ... (`qap-gguf info` lists them). [default: best]",
        ),
        click.option(
            "--model-device",
            metavar="NAME",
            help="Another device for the language model; `all` spreads it over all GPUs. [default: that of --device]",
        ),
        click.option(
            "--resize",
            type=click.Choice(RESIZES),
            expose_value=False,
            callback=_apply_resize,
            help="How pictures come to the encoder's size: as the model was trained (auto), stretched, or letterboxed "
            "(pad). [default: auto]",
        ),
        click.option(
            "--max-image-tokens",
            type=click.IntRange(1, MOST_IMAGE_TOKENS),
            metavar="N",
            expose_value=False,
            callback=functools.partial(_set_variable, "QAP_MAX_IMAGE_TOKENS"),
            help="Scale pictures down, or cut them into fewer tiles, until they have at most N tokens, where the model "
            "can. [default: QAP_MAX_IMAGE_TOKENS of the environment]",
        ),
        click.option(
            "--force-family",
            is_flag=True,
            expose_value=False,
            callback=functools.partial(_set_variable, "QAP_FORCE_FAMILY"),
            help="Prune a model, too, whose family was not compared with its original, where its tokens have a place "
            "in the picture. [default: QAP_FORCE_FAMILY of the environment]",
        ),
        click.option(
            "--kv",
            type=click.Choice(tuple(KV_TYPES)),
            multiple=multiple,
            help=f"Type of the KV cache, with flash attention.{' Repeatable.' if multiple else ''}  "
            "[default: f16 without flash attention]",
        ),
        click.option(
            "--ctx", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens that fit the KV cache."
        ),
    ]


def model_options(*, multiple: bool = False) -> Callable[[F], F]:
    """Add what every command opens a model by, from -m to --ctx; with `multiple`, -m and --kv are repeatable."""

    def decorate(function: F) -> F:
        function = _with_hub(function, multiple)
        for option in reversed(_model_options(multiple)):
            function = option(function)
        return function

    return decorate


def check_model_pair(model: Path | None, mmproj: Path | None) -> None:
    """The language model and its mmproj come together or not at all."""
    if (model is None) != (mmproj is None):
        here, missing = ("--mmproj", "-m/--model") if model is None else ("-m/--model", "--mmproj")
        raise click.UsageError(f"{here} needs {missing} too: the two files of one model belong together; give both")


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(State).debug = True


def _remember_quiet(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(State).quiet = True


def output_options(function: F) -> F:
    """Add --json, --quiet and --debug; the command takes the first as `as_json`."""
    function = click.option(
        "--quiet", is_flag=True, expose_value=False, callback=_remember_quiet, help="No notes and progress on stderr."
    )(function)
    function = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show logs and tracebacks."
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)


def is_debug() -> bool:
    """Whether --debug was given."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and ctx.ensure_object(State).debug


def is_quiet() -> bool:
    """Whether --quiet was given."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and ctx.ensure_object(State).quiet


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; paths become strings."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str))


def note(text: str) -> None:
    """Print a note on stderr, unless --quiet was given."""
    if not is_quiet():
        warn(text)


def warn(text: str) -> None:
    """Print on stderr what must be seen, with --quiet too: an error that ends nothing, a danger."""
    click.echo(text, err=True)


def one_line(err: BaseException) -> str:
    """Return the message of an exception in one line; its class where it has none."""
    return " ".join(str(err).split()) or type(err).__name__


def on_terminal() -> bool:
    """Whether notes go to a terminal, where progress bars make sense."""
    return sys.stderr.isatty() and not is_quiet()
