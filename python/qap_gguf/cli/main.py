"""The entry point: the group of subcommands, and what becomes of an exception.

Exit status: 0 done; 1 an error of ours or an unexpected one, in one line; 2 wrong usage; 130 interrupted.
A traceback is shown only with --debug. An assertion of upstream becomes one line too.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from qap_gguf import _core
from qap_gguf.cli.batch import batch
from qap_gguf.cli.bench import bench
from qap_gguf.cli.common import State, one_line, warn
from qap_gguf.cli.compare import compare
from qap_gguf.cli.convert import convert
from qap_gguf.cli.eval_cmd import eval_command
from qap_gguf.cli.imatrix import imatrix
from qap_gguf.cli.info import info
from qap_gguf.cli.quantize import quantize
from qap_gguf.cli.run import run
from qap_gguf.cli.score import score
from qap_gguf.cli.serve import serve
from qap_gguf.errors import QapError

_FAILED, _INTERRUPTED = 1, 130


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"qap-gguf {version('qap-gguf')}")
    except PackageNotFoundError:
        click.echo("qap-gguf, run from a source tree that is not installed")
    ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Ask vision-language models in GGUF format about pictures, faster.

    Of the tokens that a picture becomes, only those that matter to the quantized model are kept before the language
    model reads them.

    \b
    Try it without any download:
      qap-gguf run -p "What is in the picture?"
    """


for _command in (run, batch, compare, score, convert, imatrix, quantize, eval_command, bench, serve, info):
    cli.add_command(_command)


def _report(err: BaseException, debug: bool) -> int:
    """Say what went wrong in one line on stderr, after the traceback if that was asked for; return the exit status."""
    if debug:
        traceback.print_exception(err)
    if isinstance(err, (QapError, OSError)):
        text = one_line(err)
    else:
        text = f"unexpected {type(err).__name__}: {one_line(err)}; run again with --debug for the traceback"
    click.echo(f"qap-gguf: error: {text}", err=True)
    return _FAILED


def _hush() -> None:
    """Nobody reads stdout any more: send what is still buffered nowhere, or Python complains about it at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is no file here
        return


def _say_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In place of ``warnings.showwarning``: one line, without the place in our source."""
    warn(f"qap-gguf: warning: {' '.join(str(message).split())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Example:
        >>> main(["run", "-m", "model.gguf"])  # the reason is on stderr
        2
    """
    state = State()
    _core.on_abort("qap-gguf: error: llama.cpp stops at ", "; check the files with qap-gguf convert --check")
    shown = warnings.showwarning
    warnings.showwarning = _say_warning
    try:
        result = cli.main(
            args=None if argv is None else list(argv), prog_name="qap-gguf", standalone_mode=False, obj=state
        )
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    except BrokenPipeError:
        _hush()
        return _FAILED
    except SystemExit as stop:  # click's own answer to a broken pipe
        _hush()
        return stop.code if isinstance(stop.code, int) else _FAILED
    except Exception as err:
        return _report(err, state.debug)
    finally:
        warnings.showwarning = shown
