"""`qap-gguf score`: how each token of a picture scores, and which are kept: a table, JSON, NumPy arrays, a picture.

The scores are those of docs/method.md. No question is asked: the language model only has to be there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qap_gguf.cli.chosen import chosen_pair
from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    model_options,
    note,
    output_options,
    over_file_defaults,
    print_json,
    prune_config,
    prune_options,
    sampler_seed,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.output import check_targets, write_file
from qap_gguf.cli.pictures import allow_urls_option, one_picture

if TYPE_CHECKING:
    from qap_gguf.pruning.prune import PrunedImage
    from qap_gguf.vision.embedding import ImageEmbedding

Row = tuple[str, ...]
HEAD: Row = ("token", "row", "column", "error", "outlier", "semantic", "sensitivity", "total", "kept")
_SCORES = ("error", "outlier", "sensitivity", "semantic", "total")


def table(image: ImageEmbedding, cut: PrunedImage, top: int) -> list[Row]:
    """The `top` tokens with the highest totals, of those that can be kept, as rows of words under ``HEAD``."""
    import numpy as np

    scores, columns = cut.scores, image.grid[1]
    kept = set(cut.indices.tolist())
    signal = bool(scores.semantic.any())
    order = sorted(
        np.flatnonzero(~(image.padding | image.dropped)).tolist(), key=lambda i: (-float(scores.total[i]), i)
    )
    return [
        (
            str(i),
            str(i // columns + 1),
            str(i % columns + 1),
            f"{scores.error[i]:#.4g}",
            f"{scores.outlier[i]:#.4g}",
            f"{scores.semantic[i]:.4f}" if signal else "-",
            f"{scores.sensitivity[i]:.4f}",
            f"{scores.total[i]:.4f}",
            "yes" if i in kept else "no",
        )
        for i in order[:top]
    ]


def print_table(rows: list[Row]) -> None:
    """Print the rows on stdout: drawn on a terminal, plain columns with spaces between them otherwise."""
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for row in [HEAD, *rows]) for i in range(len(HEAD))]
        for row in [HEAD, *rows]:
            click.echo("  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEAD:
        drawn.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row, style=None if row[-1] == "yes" else "dim")
    # Wider than a narrow terminal if it must be: numbers that are cut off are of no use.
    console = Console()
    width = console.measure(drawn, options=console.options.update(max_width=1000)).maximum
    Console(width=max(width, console.width)).print(drawn)


def describe(image: ImageEmbedding, cut: PrunedImage) -> dict[str, Any]:
    """Everything that is known about the tokens, in plain values and lists."""
    return {
        "size": list(image.size),
        "grid": list(image.grid),
        "n_tokens": image.n_tokens,
        "padding": image.padding.nonzero()[0].tolist(),
        "dropped_early": image.dropped.nonzero()[0].tolist(),
        "n_keep": len(cut.indices),
        "alpha": cut.scores.alpha,
        "indices": cut.indices.tolist(),
        "positions": cut.positions.tolist(),
        "attention": None if image.attention is None else image.attention.tolist(),
        "scores": {name: getattr(cut.scores, name).tolist() for name in _SCORES},
        "seconds": {"encode": image.seconds, "score": cut.score_s, "select": cut.select_s},
    }


def arrays(image: ImageEmbedding, cut: PrunedImage, features: bool) -> dict[str, Any]:
    """What --npz holds, by name; attention and features only where they are there and asked for."""
    import numpy as np

    found: dict[str, Any] = {name: getattr(cut.scores, name) for name in _SCORES}
    found |= {"indices": cut.indices, "positions": cut.positions, "padding": image.padding}
    found["dropped_early"] = image.dropped
    found |= {"grid": np.array(image.grid, np.int32), "alpha": np.float32(cut.scores.alpha)}
    if image.attention is not None:
        found["attention"] = image.attention
    if features:
        found["features"] = image.features
    return found


@click.command(cls=GroupedCommand, short_help="Show how each token of a picture scores.")
@click.argument("word", metavar="[IMAGE]", required=False)
@allow_urls_option
@click.option("-p", "--prompt", help="Question, for the semantic scores text and clip_text.")
@click.option(
    "--top", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="Rows of the table."
)
@click.option("--npz", type=click.Path(path_type=Path), metavar="FILE", help="Write the scores as NumPy arrays.")
@click.option("--features", is_flag=True, help="Put what the projector gives, all tokens, into the --npz file too.")
@click.option(
    "--png",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the picture with dropped patches dimmed, beside maps of the scores. Needs matplotlib.",
)
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@model_options()
@prune_options(without=("dense",))
@output_options
def score(
    word: str | None,
    allow_urls: bool,
    model: Path | None,
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    kv: str | None,
    ctx: int,
    prompt: str | None,
    top: int,
    npz: Path | None,
    features: bool,
    png: Path | None,
    force: bool,
    as_json: bool,
    **prune: Any,
) -> None:
    """Show how each token of the picture IMAGE scores, and which tokens are kept.

    Each row is one token, numbered from 0: a patch of the picture at a row and a column, both from 1 at the top left.
    The table has those with the highest totals; --json and --npz have all, and say which are padding (their scores are
    0). IMAGE is a file, an address, or - for stdin; without it, the packaged sample is scored. Settings that are not
    given come from the mmproj file, if it has any.

    \b
    Columns:
      error        what rounding the token to few bits loses
      outlier      how far its largest numbers are apart
      semantic     how relevant it is to the picture, 0..1 (- where the model gives no signal)
      sensitivity  error and outlier together, 0..1
      total        alpha x semantic + (1 - alpha) x sensitivity

    \b
    Examples:
      qap-gguf score photo.jpg --n-keep 36 --png kept.png
      qap-gguf score photo.jpg -m llava-Q4_K_M.gguf --mmproj mmproj-f16.gguf --npz scores.npz
    """
    check_model_pair(model, mmproj)
    config = prune_config(prune)
    assert config is not None  # only --dense gives None
    if features and npz is None:
        raise click.UsageError("--features goes into the --npz file; give --npz FILE too")
    check_targets({"npz": npz, "png": png}, force)

    import qap_gguf as qap
    from qap_gguf.plotting.plot import plot, require_matplotlib
    from qap_gguf.vision.images import load_image

    if png is not None:
        require_matplotlib()
    name, picture = one_picture(word, allow_urls)
    pixels = load_image(picture)
    model, mmproj = chosen_pair(model, mmproj)
    seed = sampler_seed(config.seed)
    with qap.VisionModel(
        mmproj,
        model,
        device=device,
        model_device=model_device,
        kv=kv,
        n_ctx=ctx,
        n_threads=threads,
        seed=seed,
        check="child",
        verbose=is_debug(),
    ) as vlm:
        config = over_file_defaults(vlm.default_prune, config, prune)
        image = vlm.encode(pixels, config)
        cut = vlm.prune(image, config, prompt=prompt)

    if npz is not None:
        import numpy as np

        found = arrays(image, cut, features)
        write_file(npz, force, lambda file: np.savez(file, **found))
        note(f"wrote {npz}")
    if png is not None:
        drawn = plot(pixels, image, cut.scores, cut.indices, cfg=config, title=Path(name).name)
        write_file(png, force, lambda file: drawn.save(file, "PNG"))
        note(f"wrote {png}")
    if as_json:
        files = {"image": name, "model": model, "mmproj": mmproj, "npz": npz, "png": png}
        print_json({**files, "config": config.to_dict(), **describe(image, cut)})
        return
    print_table(table(image, cut, top))
    kept, total = len(cut.indices), image.n_real
    more = f", {image.n_tokens - total} more are padding" if total < image.n_tokens else ""
    more += f", {total - image.n_left} were dropped early" if image.n_left < total else ""
    click.echo(f"\nkept {kept} of {total} tokens ({100 * kept / total:.1f} %){more}, alpha {cut.scores.alpha:.3g}")
