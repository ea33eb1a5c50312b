"""`qap-gguf serve`: an OpenAI-compatible server for one model (docs/serve.md).

The address goes to stdout, one line, once the model is loaded and the port is open; the log to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from qap_gguf.cli.chosen import cache_mb_option, chosen_config, chosen_pair
from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    model_options,
    output_options,
    print_json,
    prune_config,
    prune_options,
    sampler_seed,
    warn,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.places import keeping
from qap_gguf.errors import ConfigError, ModelFileError

_MIB = 2**20


def _listen(host: str, port: int) -> socket.socket:
    """An open port; port 0 takes a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as err:
        raise ConfigError(
            f"--host, --port: expected an address to listen on, got {host}:{port} ({err.strerror or err}); "
            "choose another port"
        ) from err
    return found


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves the block as an exception, so that llama-server is ended too."""

    def leave(_number: int, _frame: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_loopback(sock: socket.socket) -> bool:
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@click.command(cls=GroupedCommand, short_help="Answer OpenAI-style requests.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--model-alias", metavar="NAME", help="Name under which the model is listed. [default: the file's name]")
@click.option("--api-key", envvar="QAP_API_KEY", metavar="KEY", help="What clients must send (or QAP_API_KEY).")
@click.option("--chat-format", metavar="NAME", help="A chat format by name. [default: the template in the GGUF]")
@click.option("--allow-urls", is_flag=True, help="Fetch images from public web addresses.")
@click.option("--max-images", type=click.IntRange(min=1), default=8, show_default=True, help="Images of a request.")
@click.option(
    "--max-image-mb", type=click.IntRange(min=1), default=16, show_default=True, help="Size of an image file, in MiB."
)
@click.option(
    "--max-megapixels",
    type=click.IntRange(min=1),
    default=25,
    show_default=True,
    help="Size of a picture, in millions.",
)
@click.option(
    "--max-body-mb", type=click.IntRange(min=1), default=32, show_default=True, help="Size of a request's body, in MiB."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer. [default: what fits the context]")
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Requests at a time; more get a 503.",
)
@click.option(
    "--max-seconds",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="Longest time of a request, waiting included; then its slot is free.",
)
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Web origin whose pages may call; may be given often.")
@click.option(
    "--route",
    "routes",
    multiple=True,
    metavar="PATH",
    help="Pass this path of llama-server on as it is (/slots, /v1/messages, / for all); may be given often. For "
    "clients that you trust.",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1, max=64),
    default=2,
    show_default=True,
    help="Answers at a time; each has a context of --ctx tokens.",
)
@cache_mb_option
@click.argument("further", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA_SERVER_OPTIONS]...")
@model_options()
@prune_options()
@output_options
def serve(
    model: Path | None,
    mmproj: Path | None,
    threads: int | None,
    device: str | None,
    model_device: str | None,
    ctx: int,
    kv: str | None,
    host: str,
    port: int,
    model_alias: str | None,
    api_key: str | None,
    chat_format: str | None,
    allow_urls: bool,
    max_images: int,
    max_image_mb: int,
    max_megapixels: int,
    max_body_mb: int,
    max_tokens: int | None,
    max_requests: int,
    max_seconds: int,
    cors: tuple[str, ...],
    routes: tuple[str, ...],
    parallel: int,
    cache_mb: int,
    further: tuple[str, ...],
    as_json: bool,
    **prune: Any,
) -> None:
    """Answer OpenAI-style requests about images for one model.

    llama.cpp's llama-server answers, behind a guard that strangers may reach. Images of requests are pruned as the
    options here say, unless a request says otherwise in its field `prune`. What stands after -- goes to llama-server.

    \b
    Examples:
      qap-gguf serve --port 8080
      qap-gguf serve -m llava-Q4_K_M.gguf --mmproj mmproj-f16.gguf --n-keep 64 --ctx 4096
      qap-gguf serve --parallel 8 -- --cache-reuse 256
    """
    check_model_pair(model, mmproj)
    config = prune_config(prune)
    try:
        import uvicorn

        from qap_gguf.serve.app import Application
        from qap_gguf.serve.connections import waiting_room
    except ImportError as err:
        raise ConfigError(f"serve: expected starlette and uvicorn ({err}); run pip install starlette uvicorn") from err

    import qap_gguf as qap
    from qap_gguf.generation.chat_formats import named_format
    from qap_gguf.serve.child import find_program
    from qap_gguf.serve.launch import ModelSettings, opened
    from qap_gguf.serve.metrics import Metrics
    from qap_gguf.serve.options import check_further
    from qap_gguf.serve.settings import ServeSettings, web_rules
    from qap_gguf.serve.upstream import Upstream
    from qap_gguf.serve.watch import watcher

    find_program()
    check_further(further)
    model, mmproj = chosen_pair(model, mmproj)
    settings = ServeSettings(
        model_name=model_alias or model.stem,
        n_ctx=ctx,
        api_key=api_key,
        sources=dataclasses.replace(
            web_rules(),
            allow_urls=allow_urls,
            max_images=max_images,
            max_bytes=max_image_mb * _MIB,
            max_pixels=max_megapixels * 10**6,
        ),
        max_body_bytes=max_body_mb * _MIB,
        max_tokens=max_tokens,
        max_requests=max_requests,
        max_seconds=max_seconds,
        cors=cors,
        routes=routes,
    )
    model = keeping(model, prune)
    # None is --dense, whatever the mmproj file says
    config = qap.PruneConfig(keep_ratio=1.0) if config is None else chosen_config(mmproj, config, prune)
    given = prune.get("seed")
    wanted = ModelSettings(
        model,
        mmproj,
        config,
        n_parallel=parallel,
        threads=threads,
        device=device,
        model_device=model_device,
        kv=kv,
        seed=None if given is None else sampler_seed(given),
        cache_mb=cache_mb,
        chat_format=None if chat_format is None else named_format(chat_format),
        further=further,
        verbose=is_debug(),
    )
    why: list[str] = []
    with _listen(host, port) as sock, opened(wanted, settings) as (preparer, child):
        child.start()
        if not _is_loopback(sock) and api_key is None:
            warn("anyone who reaches this machine can use the server: there is no --api-key")

        def ended(reason: str) -> None:
            why.append(reason)
            server.should_exit = True

        upstream, metrics = Upstream(child.port, child.key), Metrics()
        app = Application(upstream, preparer, settings, metrics, watcher(child, ended))

        def announce() -> None:
            if as_json:
                print_json({"url": _address(sock), "model": model, "mmproj": mmproj, "config": config.to_dict()})
            else:
                click.echo(f"qap-gguf serves {settings.model_name} at {_address(sock)}/v1")

        class Announced(uvicorn.Server):
            """Says that it serves when it does, and when a signal ends it in order."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                announce()

        server = Announced(
            uvicorn.Config(
                app.asgi(),
                log_level="info" if is_debug() else "warning",
                http=waiting_room(),
                timeout_graceful_shutdown=5,
            )
        )
        sys.setswitchinterval(0.001)  # of 0.005 s: words are passed on while large requests are checked
        sock.listen(128)
        with _ended_by_sigterm():
            server.run(sockets=[sock])
    if why:
        raise ModelFileError(f"serve: expected llama-server to go on, {why[0]}; start it again")
