"""`qap-gguf bench`: what pruning saves in time and memory. The logic is in qap_gguf.bench."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qap_gguf.cli.budgets import WITHOUT, budget_configs, budget_options, encoder_keep_option
from qap_gguf.cli.chosen import chosen_pair
from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    model_options,
    note,
    output_options,
    prune_options,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.output import counter_bar, print_table

if TYPE_CHECKING:
    pass

_SIDE = 672  # pixels: 576 tokens for LLaVA-1.5 and Qwen2.5-VL
_RATIOS = (0.5, 0.25, 0.125)
_SHAPES = ("llava-1.5-7b", "llava-1.5-13b", "smolvlm-256m", "qwen2.5-vl-3b", "gemma-3-4b", "internvl3-1b")


def _load() -> list[float] | None:
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _said_load(load: list[float] | None) -> str:
    """The load averages in words; what runs beside a measurement is in its figures."""
    return "not known here" if load is None else f"{load[0]:.2f} (of {os.cpu_count()} CPUs, last minute)"


def _machine(threads: int, load: list[float] | None) -> dict[str, Any]:
    """What the figures were taken on."""
    import qap_gguf as qap

    facts = qap.info()
    return {
        "devices": [device["description"] for device in facts["devices"]],
        "cpus": os.cpu_count(),
        "threads": threads,
        "load_before": load,
        "versions": facts["versions"],
        "cpu_features": facts["cpu_features"],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


@click.command(cls=GroupedCommand, short_help="Time each step, dense and pruned.")
@click.option(
    "--shape",
    type=click.Choice(_SHAPES),
    help="Make files of this model's shape with random weights, in the cache, and time those: for speed, not answers.",
)
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Picture to encode. [default: {_SIDE} x {_SIDE} pixels of noise]",
)
@budget_options(_RATIOS)
@encoder_keep_option
@click.option(
    "--text-tokens", type=click.IntRange(min=1), default=40, show_default=True, help="Text tokens of the prompt."
)
@click.option("--decode", type=click.IntRange(min=1), default=8, show_default=True, help="Tokens of the answer.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Passes for each median.")
@click.option(
    "--memory/--no-memory", default=True, show_default=True, help="Measure peak memory, in a process for each row."
)
@model_options()
@prune_options(without=(*WITHOUT, "encoder_keep"))
@output_options
def bench(
    model: Path | None,
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    ctx: int,
    shape: str | None,
    image: Path | None,
    n_keep: tuple[int, ...],
    keep_ratio: tuple[float, ...],
    encoder_keep: tuple[float, ...],
    text_tokens: int,
    decode: int,
    rounds: int,
    memory: bool,
    kv: str | None,
    as_json: bool,
    **prune: Any,
) -> None:
    """Time encode, score, select, prefill and decode, dense and with several numbers of tokens kept.

    Passes take turns in one process; the figures are medians, and the ratios medians of the ratios in each round. The
    bound is `encode + (text + K) * prefill per token of the dense pass`: no pruner can be faster by much. With an early
    drop the encode in it is that of its own pass. With --json all figures come as one JSON object, in one line.

    \b
    Examples:
      qap-gguf bench
      qap-gguf bench --shape llava-1.5-7b --n-keep 288 --n-keep 72
    """
    check_model_pair(model, mmproj)
    if shape is not None and model is not None:
        raise click.UsageError("--shape makes its own files, so -m/--model has no meaning; drop one of them")
    configs = budget_configs(n_keep, keep_ratio, _RATIOS, prune, encoder_keep)

    import qap_gguf as qap
    from qap_gguf.arguments import n_threads_default
    from qap_gguf.bench import Plan, find_shape, make_random_model, peak_bytes, run_passes, summarise
    from qap_gguf.vision.images import load_image

    if shape is not None:
        with counter_bar("tensors") as making:
            files = make_random_model(find_shape(shape), progress=making)
        model, mmproj = files.model, files.mmproj
    else:
        model, mmproj = chosen_pair(model, mmproj)
    pixels: Any = load_image(image) if image is not None else _noise()
    settings: dict[str, Any] = {
        "kv": kv,
        "device": device,
        "model_device": model_device,
        "n_ctx": ctx,
        "n_threads": threads,
    }
    load = _load()
    with qap.VisionModel(mmproj, model, **settings, check="child", verbose=is_debug()) as vlm:
        why_not = vlm.why_not_prunable
        if why_not is not None:
            if n_keep or keep_ratio:
                raise qap.UnsupportedError(f"cannot prune this model: {why_not}")
            note(f"dense only, this model cannot be pruned: {why_not}")
            configs = ()
        with counter_bar("passes") as report:
            passes = run_passes(vlm, Plan(pixels, configs, text_tokens, decode, rounds), report)
    peaks: list[int] | None = None
    if memory:
        with counter_bar("processes") as report:
            peaks = []
            for config in (None, *configs):
                peaks.append(peak_bytes(mmproj, model, settings, pixels, "a" * text_tokens, config))
                if report is not None:
                    report(len(peaks), 1 + len(configs))
    result = summarise(passes, peaks)
    if result.n_text != text_tokens:
        note(f"the prompt has {result.n_text} text tokens, not {text_tokens}: the template and one word take that many")
    line = {
        "benchmark": "bench",
        "model": str(model),
        "mmproj": str(mmproj),
        "shape": shape,
        "image": None if image is None else str(image),
        "kv": kv or "f16",
        "why_not_prunable": why_not,
        "configs": [config.to_dict() for config in configs],
        **result.to_dict(),
        "machine": _machine(threads or n_threads_default(), load),
    }
    if as_json:
        click.echo(json.dumps(_rounded(line), ensure_ascii=False, allow_nan=False))
        return
    print_table(result.table())
    click.echo(
        f"\n{result.n_tokens} image tokens, {result.n_text} text tokens, medians of {result.rounds} rounds; "
        f"x is dense / pruned; load before: {_said_load(load)}"
    )


def _noise() -> Any:
    """A picture that is the same each time: uint8 (672, 672, 3)."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
