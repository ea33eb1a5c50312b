"""llama-server for a pair of files, with what prepares its requests: for `serve` and for `batch`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qap_gguf.arguments import n_threads_default
from qap_gguf.config import WEIGHTS_KEY, PruneConfig
from qap_gguf.defaults import check_weights
from qap_gguf.files.gguf import read_gguf
from qap_gguf.files.trial import admit
from qap_gguf.generation.chat_formats import ChatFormat
from qap_gguf.serve.child import Child, prune_environment
from qap_gguf.serve.options import check_further, model_options, server_options, template_options
from qap_gguf.serve.requests import Preparer, check_semantic
from qap_gguf.serve.settings import ServeSettings
from qap_gguf.vision.resize import default_resize


@dataclass(frozen=True)
class ModelSettings:
    """What a llama-server is started with, beside what it may answer.

    Attributes:
        model, mmproj: the files.
        config: how pictures are pruned where a request says nothing else.
        n_parallel: slots.
        threads: CPU threads; None is one for each physical core.
        device, model_device: of the encoder and of the language model; None is llama-server's choice.
        kv: type of the KV cache.
        seed: of sampling; None is a random one for each request.
        cache_mb: encoded pictures kept in memory, in MiB.
        chat_format: takes the place of the model's chat template.
        further: options of llama-server's own.
        verbose: let its log through to stderr.
    """

    model: Path
    mmproj: Path
    config: PruneConfig
    n_parallel: int = 2
    threads: int | None = None
    device: str | None = None
    model_device: str | None = None
    kv: str | None = None
    seed: int | None = None
    cache_mb: int = 256
    chat_format: ChatFormat | None = None
    further: tuple[str, ...] = ()
    verbose: bool = False


def check_settings(wanted: ModelSettings, n_ctx: int) -> Sequence[str]:
    """The options that load the pair of files, which are checked and tried first.

    Args:
        wanted: what is started.
        n_ctx: tokens of a slot's context.

    Raises:
        ConfigError: a setting that cannot be.
        ModelFileError: a file cannot be used, or the KV cache does not fit the memory.
        UnsupportedError: the mmproj file lacks weights for error "model".
    """
    check_further(wanted.further)
    check_semantic(wanted.config)
    admit(wanted.mmproj, wanted.model, n_ctx * wanted.n_parallel, check="child")
    check_weights(wanted.config, WEIGHTS_KEY in read_gguf(wanted.mmproj).metadata, wanted.mmproj)
    return model_options(
        wanted.model,
        wanted.mmproj,
        n_ctx=n_ctx,
        n_parallel=wanted.n_parallel,
        threads=wanted.threads or n_threads_default(),
        device=wanted.device,
        model_device=wanted.device if wanted.model_device is None else wanted.model_device,
        kv=wanted.kv,
        seed=wanted.seed,
    )


@contextlib.contextmanager
def opened(wanted: ModelSettings, settings: ServeSettings) -> Iterator[tuple[Preparer, Child]]:
    """What prepares requests, and a llama-server that is not started yet; both end with the block.

    Raises:
        ConfigError: a setting that cannot be, or the package was built without llama-server.
        ModelFileError: a file cannot be used.
    """
    words = [*check_settings(wanted, settings.n_ctx), *server_options(settings.model_name, settings.max_requests)]
    env = prune_environment(wanted.config)
    env |= {"QAP_IMAGE_CACHE_MB": str(wanted.cache_mb), "QAP_RESIZE": default_resize()}
    with (
        contextlib.closing(
            Preparer(wanted.model, wanted.mmproj, wanted.config, settings, wanted.chat_format)
        ) as preparer,
        template_options(preparer.form) as template,
        contextlib.closing(Child([*words, *template, *wanted.further], env, verbose=wanted.verbose)) as child,
    ):
        yield preparer, child
