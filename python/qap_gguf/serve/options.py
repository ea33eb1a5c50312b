"""llama-server's options for ours."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qap_gguf.errors import ConfigError
from qap_gguf.generation.chat_formats import ChatFormat
from qap_gguf.language.kv_types import kv_settings
from qap_gguf.language.opener import batch_rows
from qap_gguf.runtime.devices import ALL, find_device, language_settings

#: What the guard decides: options after ``--`` may be any others.
_OURS: Final = (
    "--host", "--port", "--api-key", "--api-key-file", "--model", "-m", "--mmproj", "-mm", "--mmproj-url", "-mmu",
    "-hf", "-hfr", "--hf-repo", "--model-url", "-mu", "--parallel", "-np", "--ctx-size", "-c", "--ssl-key-file",
    "--ssl-cert-file", "--api-prefix", "--chat-template", "--chat-template-file",
)  # fmt: skip
#: The template of formats that llama-server would join otherwise than we: it gets the whole prompt as one message.
RENDERED: Final = "{%- for message in messages -%}{{ message.content }}{%- endfor -%}"
_N_UBATCH: Final = 512
_MORE_THREADS: Final = 8  # for /metrics, while every request that is let in has its own


def check_further(words: Sequence[str]) -> None:
    """The options after ``--`` are none that the guard decides.

    Raises:
        ConfigError: one is.
    """
    for word in words:
        name = word.partition("=")[0]
        if name in _OURS:
            raise ConfigError(f"serve: expected options of llama-server after --, got {name}, which serve sets itself")


def model_options(
    model: Path,
    mmproj: Path,
    *,
    n_ctx: int,
    n_parallel: int,
    threads: int,
    device: str | None,
    model_device: str | None,
    kv: str | None,
    seed: int | None,
) -> list[str]:
    """The options that load the pair of files.

    Args:
        model, mmproj: the files.
        n_ctx: tokens of each slot's context.
        n_parallel: slots.
        threads: CPU threads.
        device, model_device: of the encoder and of the language model; None is llama-server's choice.
        kv: type of the KV cache.
        seed: of sampling; None is a random one for each request.

    Raises:
        ConfigError: no such device or type.
    """
    words = ["-m", str(model), "--mmproj", str(mmproj)]
    words += ["--parallel", str(n_parallel), "--ctx-size", str(n_ctx * n_parallel), "--no-kv-unified"]
    rows = batch_rows(mmproj)
    if rows > _N_UBATCH:
        words += ["--batch-size", str(max(2048, rows)), "--ubatch-size", str(rows)]
    words += ["--threads", str(threads), "--threads-batch", str(threads)]
    encoder = find_device(device)
    if encoder is not None:
        words += ["--mmproj-device", "none" if encoder.kind == "cpu" else encoder.name]
    language_settings(model_device)  # refuses what libllama does not use by itself
    language = (
        None if model_device is None or model_device.lower() == ALL else find_device(model_device, "model_device")
    )
    if language is not None:
        words += ["--device", "none" if language.kind == "cpu" else language.name]
    if kv_settings(kv):
        words += ["--cache-type-k", str(kv), "--cache-type-v", str(kv), "--flash-attn", "on"]
    if seed is not None:
        words += ["--seed", str(seed)]
    return words


def server_options(model_name: str, max_requests: int) -> list[str]:
    """The options that make it a server behind the guard: no page, no slots, a thread for each request."""
    return [
        "--alias", model_name.replace(",", "_"), "--threads-http", str(max_requests + _MORE_THREADS), "--metrics",
        "--no-ui", "--no-slots", "--offline", "--no-prefill-assistant", "--cache-ram", "512",
    ]  # fmt: skip


@contextlib.contextmanager
def template_options(form: ChatFormat | None) -> Iterator[list[str]]:
    """The options for a chat format; it is in a file as long as the block lasts."""
    if form is None:
        yield []
        return
    source = form.source if form.kind == "jinja" else RENDERED
    with tempfile.TemporaryDirectory(prefix="qap-gguf-") as folder:
        path = Path(folder) / "template.jinja"
        path.write_text(source, encoding="utf-8")
        yield ["--jinja", "--chat-template-file", str(path)]
