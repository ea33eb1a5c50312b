"""`qap-gguf serve`: an OpenAI-compatible server for one model (docs/serve.md).

The address goes to stdout, one line, once the model is loaded and the port is open; the log to stderr.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from pathlib import Path
from typing import Any

import click

from qap_gguf.cli.common import (
    check_model_pair,
    is_debug,
    model_options,
    output_options,
    over_file_defaults,
    print_json,
    prune_config,
    prune_options,
    sampler_seed,
    warn,
)
from qap_gguf.cli.groups import GroupedCommand
from qap_gguf.cli.places import keeping
from qap_gguf.errors import ConfigError

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
@click.option("--logprobs", is_flag=True, help="Let requests ask for logprobs; takes ctx x vocabulary floats.")
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
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Web origin whose pages may call; may be given often.")
@click.option(
    "--cache-mb",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Encoded images kept in memory, in MiB.",
)
@click.option(
    "--cache-folder", type=click.Path(path_type=Path), metavar="DIR", help="Keep encoded images beyond the process too."
)
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
    logprobs: bool,
    allow_urls: bool,
    max_images: int,
    max_image_mb: int,
    max_megapixels: int,
    max_body_mb: int,
    max_tokens: int | None,
    max_requests: int,
    cors: tuple[str, ...],
    cache_mb: int,
    cache_folder: Path | None,
    as_json: bool,
    **prune: Any,
) -> None:
    """Answer OpenAI-style requests about images for one model.

    Images of requests are pruned as the options here say, unless a request says otherwise in its field `prune`.

    \b
    Examples:
      qap-gguf serve --port 8080
      qap-gguf serve -m llava-Q4_K_M.gguf --mmproj mmproj-f16.gguf --n-keep 64 --ctx 4096
    """
    check_model_pair(model, mmproj)
    config = prune_config(prune)
    try:
        import uvicorn

        from qap_gguf.serve import ServeSettings, create_app
        from qap_gguf.serve.connections import waiting_room
        from qap_gguf.serve.settings import web_rules
    except ImportError as err:
        raise ConfigError(f"serve: expected fastapi and uvicorn ({err}); run pip install fastapi uvicorn") from err

    import qap_gguf as qap
    from qap_gguf.files.gguf import read_gguf
    from qap_gguf.language.opener import open_language

    if model is None or mmproj is None:
        packaged = qap.packaged_model()
        model, mmproj = packaged.model, packaged.mmproj
    rules = dataclasses.replace(
        web_rules(),
        allow_urls=allow_urls,
        max_images=max_images,
        max_bytes=max_image_mb * _MIB,
        max_pixels=max_megapixels * 10**6,
    )
    settings = ServeSettings(
        model_name=model_alias or model.stem,
        api_key=api_key,
        sources=rules,
        max_body_bytes=max_body_mb * _MIB,
        max_tokens=max_tokens,
        max_requests=max_requests,
        cors=cors,
    )
    model = keeping(model, prune)
    if config is not None:
        config = over_file_defaults(qap.PruneConfig.from_metadata(read_gguf(mmproj).metadata), config, prune)
    else:
        config = qap.PruneConfig(keep_ratio=1.0)  # --dense, whatever the mmproj file says
    cache = qap.EmbeddingCache(cache_mb * _MIB, cache_folder)
    with (
        _listen(host, port) as sock,
        qap.ChatHandler(
            mmproj, config, chat_format=chat_format, sources=rules, device=device, cache=cache, verbose=is_debug()
        ) as handler,
    ):
        llama = open_language(
            model,
            mmproj,
            device=device if model_device is None else model_device,
            kv=kv,
            n_ctx=ctx,
            n_threads=threads,
            seed=sampler_seed(prune.get("seed") or 0),
            logits_all=logprobs,
            check="child",
            verbose=is_debug(),
        )
        handler.vision_model(llama)  # errors of the mmproj belong here, not to the first request
        if not _is_loopback(sock) and api_key is None:
            warn("anyone who reaches this machine can use the server: there is no --api-key")
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(llama, handler, settings),
                log_level="info" if is_debug() else "warning",
                http=waiting_room(),
                timeout_graceful_shutdown=5,
            )
        )
        sock.listen(128)
        if as_json:
            print_json({"url": _address(sock), "model": model, "mmproj": mmproj, "config": config.to_dict()})
        else:
            click.echo(f"qap-gguf serves {settings.model_name} at {_address(sock)}/v1")
        server.run(sockets=[sock])
        llama.close()
