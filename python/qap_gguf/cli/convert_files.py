"""The ways of `qap-gguf convert` that take GGUF files instead of a checkpoint: --annotate, --keep-positions,
--mmproj-type and --check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qap_gguf.cli.common import make_config, note, over_file_defaults, print_json, prune_given
from qap_gguf.cli.output import counter_bar
from qap_gguf.cli.progress import progress_bar, stops_cleanly
from qap_gguf.config import PruneConfig

if TYPE_CHECKING:
    from qap_gguf.convert import FileReport, PairReport


def is_given(name: str) -> bool:
    """Whether the user gave this option of the running command."""
    return click.get_current_context().get_parameter_source(name) != ParameterSource.DEFAULT


def refuse_options(way: str, *names: str) -> None:
    """Options that mean nothing for this way of the command are a usage error, not passed over."""
    for name in names:
        if is_given(name):
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} has no meaning with {way}; drop one of them")


def annotate_file(
    source: Path, out: Path, prune: Mapping[str, Any], *, imatrix: Path | None, force: bool, as_json: bool
) -> None:
    """Copy an mmproj file with its defaults changed by the options, or without defaults for --dense."""
    given = prune_given(prune)
    if imatrix is not None and not given:
        raise click.UsageError("--imatrix brings channel weights for --error model; give that or another default too")
    if not given and not prune.get("dense"):
        raise click.UsageError("--annotate changes pruning defaults: give --keep-ratio or another, or --dense for none")

    import qap_gguf as qap
    from qap_gguf.files.gguf import check_mmproj, read_gguf
    from qap_gguf.files.trial import check_trial

    check_mmproj(source, memory=False)
    check_trial(source, None)
    config = None
    if given:
        config = make_config(given)
        config = over_file_defaults(PruneConfig.from_metadata(read_gguf(source).metadata), config, prune)
    written = qap.annotate(source, out, config, imatrix=imatrix, force=force)
    if as_json:
        print_json({"mmproj": written, "metadata": None if config is None else config.to_metadata()})
    else:
        click.echo(written)


def measuring(data: Path, out: Path, config: PruneConfig | None, *, force: bool) -> Callable[[Path, Path], Path]:
    """What `convert` calls with its two float files: measures an importance matrix on `data` and returns `out`."""

    def measure(model: Path, mmproj: Path) -> Path:
        from qap_gguf.eval import measure_imatrix

        with counter_bar("imatrix") as report:
            return measure_imatrix(
                data, out, model=model, mmproj=mmproj, prune=config, check="child", progress=report, force=force
            ).path

    return measure


def relabel_file(source: Path, out: Path, *, undo: bool, force: bool, as_json: bool) -> None:
    """Copy a language model so that image tokens can keep their places, or undo that."""
    from qap_gguf.convert.relabel import STOCK, relabel
    from qap_gguf.files.gguf import check_language
    from qap_gguf.files.trial import check_trial

    check_language(source, memory=False)
    check_trial(None, source)
    with stops_cleanly(), progress_bar() as report:
        written = relabel(source, out, undo=undo, force=force, progress=report)
    if as_json:
        print_json({"model": written, "undo": undo})
    else:
        if not undo:
            note(f"{written.name} is relabelled, {STOCK}; --undo gives the original back")
        click.echo(written)


def requantize_file(source: Path, out: Path, mmproj_type: str, *, force: bool, as_json: bool) -> None:
    """Copy an mmproj file with its encoder's matrices in another type."""
    import qap_gguf as qap
    from qap_gguf.files.gguf import check_mmproj
    from qap_gguf.files.trial import check_trial

    check_mmproj(source, memory=False)
    check_trial(source, None)
    with stops_cleanly(), progress_bar() as report:
        made = qap.requantize(source, out, mmproj_type, force=force, progress=report)
    if as_json:
        print_json({"mmproj": made.path, "mmproj_type": mmproj_type, "changed": made.changed, "notes": made.notes})
        return
    for line in made.notes:
        note(line)
    click.echo(made.path)


def check_given(paths: tuple[str, ...], *, allow_http: bool, as_json: bool) -> None:
    """Print what the files are; exit status 1 when one cannot be used, or two do not fit."""
    if not paths:
        raise click.UsageError("Missing argument 'FILE...'.")

    import qap_gguf as qap

    report = qap.check_files(*paths, allow_http=allow_http)
    if as_json:
        print_json(report.to_dict())
    else:
        for file in report.files:
            click.echo("\n".join(_file_lines(file)))
        for pair in report.pairs:
            click.echo("\n".join(_pair_lines(pair)))
    if not report.ok:
        click.get_current_context().exit(1)


def _size(n_bytes: float) -> str:
    """A number of bytes for people."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if n_bytes >= unit), (1e3, "kB"))
    return f"{n_bytes / unit:.1f} {name}"


def _file_lines(file: FileReport) -> Iterator[str]:
    yield f"{file.path}: {file.kind}" + (f", {file.family}" if file.family else "")
    if file.error:
        yield f"  error: {file.error}"
    if file.n_read is not None:
        size = "bytes" if file.size is None else f"of {file.size:,} bytes"
        yield f"  read: {file.n_read:,} {size}, the header; nothing was tried that needs its weights"
    if file.weights:
        yield f"  weights: {', '.join(f'{kind} {_size(n_bytes)}' for kind, n_bytes in file.weights.items())}"
    if file.image:
        yield f"  image: {', '.join(f'{name} {value}' for name, value in file.image.items())}"
    if file.memory is not None:
        yield f"  memory: about {_size(file.memory)} for the encoder and one picture"
    if file.width is not None:
        tokens = f", {file.n_tokens} tokens an image" if file.n_tokens is not None else ""
        yield f"  width of a token: {file.width}{tokens}"
    if file.kind == "mmproj" and file.width is not None:
        yield f"  pruning: {file.why_not_prunable or 'semantic scores ' + ', '.join(file.semantics)}"
        if file.defaults is not None:
            stored = (f"{name} {value}" for name, value in file.defaults.to_dict().items() if name != "seed")
            yield f"  defaults: {', '.join(word for word in stored if not word.endswith(' None'))}"
        else:
            yield "  defaults: none"
    for defect in file.warnings:
        issue = f" (its issue {defect.issue})" if defect.issue else ""
        yield f"  warning: stock llama.cpp{issue}: {defect.text}. " + (
            "qap_gguf fixes this" if defect.fixed else "qap_gguf does not fix this"
        )


def _pair_lines(pair: PairReport) -> Iterator[str]:
    yield f"{pair.mmproj} with {pair.model}: {'fits' if pair.fits else 'does not fit'}"
    if pair.reason:
        yield f"  error: {pair.reason}"
    if pair.fits and pair.why_not_prunable:
        yield f"  pruning: {pair.why_not_prunable}"
    elif pair.fits:
        model = "MODEL.gguf" if isinstance(pair.model, str) else pair.model  # of a far one, the copy that is fetched
        cure = f"; relabel with qap-gguf convert --keep-positions {model} OUT.gguf" if pair.relabel else ""
        yield f"  positions: {'keep' if 'keep' in pair.positions else 'compact only' + cure}"
