"""Tables on stdout and progress bars on stderr, for the subcommands that measure."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from qap_gguf.cli.common import on_terminal
from qap_gguf.errors import QapError
from qap_gguf.files.atomic import replacing

if TYPE_CHECKING:
    from qap_gguf.eval.report import Table


@contextlib.contextmanager
def counter_bar(what: str, *, start: int = 0, rate: bool = False) -> Iterator[Callable[..., None] | None]:
    """Yield a function (done, total, ...) that moves a bar on stderr, or None where stderr is no terminal.

    Args:
        what: is counted.
        start: were done before.
        rate: say how many there are a minute.
    """
    if not on_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{60 * task.speed:.3g}/min")

    columns = [TextColumn(what), BarColumn(), MofNCompleteColumn(), *([Rate()] if rate else []), Remaining()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, completed=start)

        def report(done: int, total: int, *_: object) -> None:
            progress.update(task, completed=done, total=total)

        yield report


def split_table(table: Table, width: int = 100) -> list[Table]:
    """A table that is too wide as several, each at most `width` characters as Markdown if its columns allow it.

    Each begins with the columns up to "K", which name the row.
    """
    head, rows = table
    lead = head.index("K") + 1
    sizes = [max(len(row[i]) for row in [head, *rows]) + 3 for i in range(len(head))]
    parts: list[list[int]] = [[]]
    for column in range(lead, len(head)):
        if parts[-1] and sum(sizes[:lead]) + sum(sizes[i] for i in parts[-1]) + sizes[column] + 1 > width:
            parts.append([])
        parts[-1].append(column)
    chosen = [[*range(lead), *part] for part in parts]
    return [(tuple(head[i] for i in part), [tuple(row[i] for i in part) for row in rows]) for part in chosen]


def print_table(table: Table) -> None:
    """Print a table on stdout: drawn on a terminal, Markdown in a pipe or file."""
    from qap_gguf.eval import markdown

    if not sys.stdout.isatty():
        click.echo(markdown(table))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table[0]):
        drawn.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in table[1]:
        drawn.add_row(*row)
    # Wider than a narrow terminal if it must be: numbers cut off or broken in two are of no use.
    console = Console()
    width = console.measure(drawn, options=console.options.update(max_width=1000)).maximum
    Console(width=max(width, console.width)).print(drawn)


def check_targets(targets: dict[str, Path | None], force: bool) -> None:
    """Check where files are to go, before anything slow happens.

    Args:
        targets: path of each kind of file by its ending, "npz" and "png"; None where it was not asked for.

    Raises:
        click.UsageError: a name that ends otherwise.
        QapError: the name is taken, or its folder is not there.
    """
    for kind, path in targets.items():
        if path is None:
            continue
        if path.suffix.lower() != f".{kind}":
            raise click.UsageError(f"--{kind} writes a .{kind} file, got {path}; end the name in .{kind}")
        if path.is_dir() or not path.parent.is_dir():
            wrong = "a folder" if path.is_dir() else f"no folder {path.parent}"
            raise QapError(f"--{kind}: expected a file in a folder that is there, got {wrong}; choose another name")
        if path.exists() and not force:
            raise QapError(f"--{kind}: expected no file {path}, found one; give --force to overwrite it")


def write_file(path: Path, force: bool, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file, then give it its name: nothing half-written is ever found under `path`."""
    with replacing(path) as temporary:
        with temporary.open("xb") as file:
            write(file)
        check_targets({path.suffix.lower()[1:]: path}, force)  # it may have been made in the meantime
