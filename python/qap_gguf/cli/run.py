"""`qap-gguf run`: ask a model about pictures, once or in a conversation.

The answer streams to stdout; how many image tokens were kept and where the time went follows on stderr.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from qap_gguf.cli.chosen import chosen_pair
from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    model_options,
    note,
    one_line,
    output_options,
    over_file_defaults,
    print_json,
    prune_config,
    prune_given,
    prune_options,
    sampler_seed,
    warn,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.pictures import allow_urls_option, find_pictures
from qap_gguf.cli.places import keeping
from qap_gguf.config import PruneConfig
from qap_gguf.errors import QapError

_TIMES = ("encode", "score", "select", "prefill", "decode")
_HELP_LINE = "/image PATH takes another picture, /quit ends (Ctrl-D too), Ctrl-C stops an answer."


@dataclass(frozen=True)
class Answering:
    """What stays the same from question to question: the model (a VisionModel) and how it answers."""

    vlm: Any
    config: PruneConfig | None
    max_tokens: int
    temperature: float

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of VisionModel.generate and chat."""
        return {
            "prune": self.config,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
        }


@dataclass
class Conversation:
    """Turns so far, as VisionModel.chat takes them. The pictures stand in the first user turn, encoded once."""

    images: list[Any]
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Append a user turn."""
        content: Any = text if self.messages else [*self.images, text]
        self.messages.append({"role": "user", "content": content})

    def answer(self, text: str) -> None:
        """Append the model's turn; without a word from it, take the question back so that turns keep alternating."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()


def stats_block(stats: dict[str, Any]) -> str:
    """Return the block for stderr: kept of all image tokens, then the times in ms.

    Args:
        stats: GenerationStats.to_dict(): counts, and seconds under names that end in ``_s``.

    Example:
        >>> print(stats_block({"n_image_tokens": 144, "n_image_kept": 18, "n_generated": 2, "encode_s": 0.05,
        ...     "n_cached": 0, "score_s": 0.001, "select_s": 0.0, "prefill_s": 0.02, "decode_s": 0.04}))
        image tokens: 18 of 144 kept (12.5 %)
        encode 50.0 ms, score 1.0 ms, select 0.0 ms, prefill 20.0 ms, decode 40.0 ms (50.0 tokens/s)
    """
    total, kept = stats["n_image_tokens"], stats["n_image_kept"]
    share = f" ({100 * kept / total:.1f} %)" if total else ""
    times = [f"{name} {1000 * stats[name + '_s']:.1f} ms" for name in _TIMES]
    if stats["n_cached"]:
        times[0] += " (cached)" if not stats["encode_s"] else f" ({stats['n_cached']} cached)"
    if stats["n_generated"] and stats["decode_s"] > 0:
        times[-1] += f" ({stats['n_generated'] / stats['decode_s']:.1f} tokens/s)"
    return f"image tokens: {kept} of {total} kept{share}\n{', '.join(times)}"


def stream_to_stdout(pieces: Iterable[str]) -> str:
    """Print the pieces as they come, each flushed, and return them joined. Ctrl-C passes through, after a newline."""
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece)
            click.echo(piece, nl=False)
    finally:
        # A shell prompt or the next note must not start in the middle of the answer's line.
        if sys.exc_info()[0] in (None, KeyboardInterrupt):
            click.echo()
    return "".join(said)


def read_line() -> str:
    """Read one question; EOFError at the end. The prompt appears on a terminal only, never in piped output."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _say(answering: Answering, conversation: Conversation, text: str) -> None:
    """Ask one question in the conversation and print the answer.

    On a terminal Ctrl-C stops the answer, not the conversation; in a pipe nobody could end it otherwise.
    """
    conversation.ask(text)
    said: list[str] = []
    try:
        generation = answering.vlm.chat(conversation.messages, **answering.settings())
        with contextlib.closing(generation) if hasattr(generation, "close") else contextlib.nullcontext():
            stream_to_stdout(_recorded(generation, said))
        note(stats_block(generation.stats.to_dict()))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        note("stopped")
    except QapError as err:  # too long for the context, say: the conversation goes on
        warn(f"qap-gguf: error: {one_line(err)}")
    conversation.answer("".join(said))


def _recorded(pieces: Iterable[str], said: list[str]) -> Iterable[str]:
    """Pass `pieces` on and keep them in `said`, which still holds them after an interruption."""
    for piece in pieces:
        said.append(piece)
        yield piece


def converse(answering: Answering, images: list[Any]) -> None:
    """Read questions until /quit or the end of input."""
    conversation = Conversation(images)
    if sys.stdin.isatty():
        note(_HELP_LINE)
    while True:
        try:
            text = read_line().strip()
        except EOFError:
            if sys.stdin.isatty():
                note("")
            return
        command, _, rest = text.partition(" ")
        if not text:
            continue
        if command in ("/quit", "/exit"):
            return
        if command == "/image":
            if not rest.strip():
                note("/image needs the path of a picture, as in: /image photo.jpg")
                continue
            try:
                pictures = answering.vlm.load_fitting([Path(rest.strip()).expanduser()], answering.config)
                conversation = Conversation([answering.vlm.encode(pictures[0], answering.config)])
            except (QapError, OSError) as err:
                warn(f"qap-gguf: error: {one_line(err)}; the picture stays as it was")
            else:
                note("new picture, new conversation")
        elif command.startswith("/"):
            note(f"unknown command {command}; {_HELP_LINE}")
        else:
            _say(answering, conversation, text)


def ask_once(answering: Answering, images: list[Any], text: str, description: dict[str, Any] | None) -> None:
    """Ask one question. With a `description` (model files and so on), print it and the result as one JSON object."""
    generation = answering.vlm.generate([*images, text], **answering.settings())
    if description is None:
        stream_to_stdout(generation)
        note(stats_block(generation.stats.to_dict()))
        return
    answer = "".join(generation)
    kept = [indices.tolist() for indices in generation.kept]
    config = None if answering.config is None else answering.config.to_dict()
    stats = generation.stats.to_dict()
    print_json({"answer": answer, "prompt": text, **description, "config": config, "stats": stats, "kept": kept})


@click.command(cls=GroupedCommand, short_help="Ask a model about a picture.")
@click.option(
    "--image",
    "image_words",
    multiple=True,
    metavar="FILE",
    help="Picture to ask about: a file, a pattern, an address, or - for stdin; may be given several times. "
    "[default: the packaged sample]",
)
@allow_urls_option
@click.option("-p", "--prompt", help="Question. Without it, questions are read from the terminal or from stdin.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer, in tokens."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Randomness of the answer; 0 always takes the likeliest token.",
)
@model_options()
@prune_options()
@output_options
def run(
    model: Path | None,
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    kv: str | None,
    ctx: int,
    image_words: tuple[str, ...],
    allow_urls: bool,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    as_json: bool,
    **prune: Any,
) -> None:
    """Ask a vision-language model about a picture.

    By default a quarter of the picture's tokens is kept, unless the environment or the mmproj file has defaults of its
    own; --dense keeps all. Without a model the small one that comes with the package answers: it knows pictures of
    emoji in a grid and nothing else.

    \b
    Examples:
      qap-gguf run -p "What is in row 2, column 3?"
      qap-gguf run -m llava-Q4_K_M.gguf --mmproj mmproj-f16.gguf --image cat.jpg -p "Describe it." --n-keep 64
    """
    check_model_pair(model, mmproj)
    config = prune_config(prune)
    if prompt is not None and not prompt.strip():
        raise click.UsageError("-p/--prompt is empty; write a question")
    if as_json and prompt is None:
        raise click.UsageError("--json prints one object for one question; give it with -p/--prompt")

    import qap_gguf as qap

    model, mmproj = chosen_pair(model, mmproj)
    if "-" in image_words and prompt is None:
        raise click.UsageError("--image -: the picture comes from stdin, so give the question with -p/--prompt")
    pictures = find_pictures(image_words, allow_urls)
    if not pictures:
        sample = qap.packaged_model().sample
        pictures = [(str(sample), sample)]
        note(f"no --image, so this is about the packaged sample {sample}")
    seed = sampler_seed(prune.get("seed") or 0)
    model = keeping(model, prune)
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
        if config is not None:
            usual = vlm.default_prune
            if usual is None and not prune_given(prune):
                note(f"all image tokens are kept: {vlm.why_not_prunable}")
                config = None
            else:
                config = over_file_defaults(usual, config, prune)
        fitting = vlm.load_fitting([picture for _, picture in pictures], config, prompt or "")
        images = [vlm.encode(pixels, config) for pixels in fitting]
        answering = Answering(vlm, config, max_tokens, temperature)
        if prompt is None:
            converse(answering, images)
            return
        files = {"model": model, "mmproj": mmproj, "images": [name for name, _ in pictures]}
        ask_once(answering, images, prompt, files if as_json else None)
