"""Progress of work that takes its time: a bar on stderr, and an end that leaves nothing half-written."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from qap_gguf.cli.common import on_terminal

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
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("reading", total=None)

    def report(done: int, total: int, what: str) -> None:
        progress.start()  # not before: a download from the hub draws bars of its own
        progress.update(task, description=what, completed=done, total=total)

    try:
        yield report
    finally:
        progress.stop()


@contextlib.contextmanager
def stops_cleanly() -> Iterator[None]:
    """A polite request to end (SIGTERM, a closed terminal) is heard as Ctrl-C is: half-written files are removed."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), signal.default_int_handler) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
