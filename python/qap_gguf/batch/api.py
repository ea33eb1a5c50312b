"""The interface of Python: :func:`batch` for rows that end, :class:`BatchModel` for a model that stays."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from qap_gguf.arguments import check_integer, check_number, check_threads
from qap_gguf.batch.engine import TRIES, Engine
from qap_gguf.batch.inputs import find_input
from qap_gguf.batch.pipeline import AHEAD, Run
from qap_gguf.batch.results import BatchResult
from qap_gguf.batch.rows import Defaults
from qap_gguf.batch.slots import auto_slots
from qap_gguf.config import PruneConfig
from qap_gguf.defaults import UNSET, Unset, check_config, get_default
from qap_gguf.errors import ConfigError
from qap_gguf.files.gguf import read_gguf
from qap_gguf.files.packaged import packaged_model
from qap_gguf.generation.chat_formats import named_format
from qap_gguf.serve.child import find_program
from qap_gguf.serve.launch import ModelSettings, opened
from qap_gguf.serve.settings import ServeSettings
from qap_gguf.vision.images import MAX_BYTES
from qap_gguf.vision.sources import SourceRules

Rows = str | os.PathLike[str] | Iterable[Any]
MOST_SLOTS: Final = 64
_MOST_PIXELS: Final = 2**40  # Pillow's own limit holds


class BatchModel:
    """A pair of files in a llama-server of its own, for any number of batches.

    Args:
        model, mmproj: GGUF files; None and None take the packaged pair.
        prompt: the question of rows that have none.
        system: a system message, for all rows that have none.
        prune: how pictures are pruned; None keeps all tokens. Left out, it is :func:`qap_gguf.get_default`, else what
            the mmproj file says, else ``PruneConfig()``.
        parallel: answers that are made side by side, 1..64, or "auto": as many as fit the memory (docs/batch.md).
        n_ctx: tokens of each answer's context.
        n_threads: CPU threads; None is one for each physical core.
        max_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token.
        seed: of sampling, the same for each row.
        stop: texts that end an answer.
        response_format: OpenAI's, such as ``{"type": "json_schema", "json_schema": {"schema": {...}}}``.
        device, model_device, kv: see :class:`qap_gguf.VisionModel`.
        chat_format: a chat format by name; None is the template of the file.
        allow_urls: fetch pictures from public web addresses.
        cache_mb: encoded pictures kept in memory, in MiB.
        tries: how often a row is asked where llama-server ends while it answers.
        verbose: let llama-server's log through to stderr.
        n_rows: "auto" makes no more answers side by side than these.
        every: seconds between the frames of videos among the rows' files (docs/batch.md).

    Attributes:
        n_parallel: answers side by side.
        numbers: what "auto" counted with: free, files, cell (bytes) and n_ctx; empty where a number was given.
        engine: llama-server's keeper; `n_restarts` says how often it was started again.
        config: how pictures are pruned where a row says nothing else.

    Raises:
        ConfigError: a setting that cannot be, or the package was built without llama-server.
        ModelFileError: a file cannot be used.

    Example:
        >>> import qap_gguf as qap
        >>> from qap_gguf.batch import BatchModel
        >>> with BatchModel(prompt="How many objects are there?", prune=None, n_ctx=512, n_threads=1) as model:
        ...     [(row.answer, row.kept) for row in model.run([qap.packaged_model().sample])]
        [('four', 144)]
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = None,
        *,
        prompt: str | None = None,
        system: str | None = None,
        prune: PruneConfig | Unset | None = UNSET,
        parallel: int | Literal["auto"] = "auto",
        n_ctx: int = 2048,
        n_threads: int | None = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        response_format: Mapping[str, Any] | None = None,
        device: str | None = None,
        model_device: str | None = None,
        kv: str | None = None,
        chat_format: str | None = None,
        allow_urls: bool = False,
        cache_mb: int = 256,
        tries: int = TRIES,
        verbose: bool = False,
        n_rows: int | None = None,
        every: float | None = None,
    ) -> None:
        if (model is None) != (mmproj is None):
            raise ConfigError("model, mmproj: expected both files of a pair or neither, got one; give both")
        check_integer("n_ctx", n_ctx, 1)
        check_integer("max_tokens", max_tokens, 1)
        check_integer("tries", tries, 1, 100)
        check_integer("cache_mb", cache_mb, 0)
        check_number("temperature", temperature, float("inf"))
        check_threads(n_threads)
        if parallel != "auto":
            check_integer("parallel", parallel, 1, MOST_SLOTS)
        if not isinstance(prune, Unset) and prune is not None:
            check_config(prune)
        find_program()
        files = packaged_model()
        model, mmproj = Path(model or files.model), Path(mmproj or files.mmproj)
        self.config = _config(prune, mmproj)
        answer: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        answer |= {"stop": [stop] if isinstance(stop, str) else list(stop)} if stop else {}
        answer |= {"response_format": response_format} if response_format is not None else {}
        self._every, self._defaults = every, Defaults(prompt, system, answer, self.config)
        place = device if model_device is None else model_device
        self.n_parallel, self.numbers = (
            auto_slots(model, mmproj, n_ctx, kv, place, n_rows) if parallel == "auto" else (int(parallel), {})
        )
        wanted = ModelSettings(
            model, mmproj, self.config, self.n_parallel, n_threads, device, model_device, kv, seed=seed % 2**31,
            cache_mb=cache_mb, chat_format=None if chat_format is None else named_format(chat_format), verbose=verbose,
        )  # fmt: skip
        rules = SourceRules(allow_urls=allow_urls, max_bytes=MAX_BYTES, max_pixels=_MOST_PIXELS)
        settings = ServeSettings(model.stem, n_ctx, sources=rules, max_requests=self.n_parallel + AHEAD)
        with contextlib.ExitStack() as stack:
            self._preparer, child = stack.enter_context(opened(wanted, settings))
            self.engine = Engine(child, tries)
            stack.callback(self.engine.close)
            self.engine.start()
            self._end = weakref.finalize(self, stack.pop_all().close)

    def run(self, rows: Rows, *, known: Container[str] = ()) -> Iterator[BatchResult]:
        """The results of rows, each as soon as it is there; see :func:`batch`. One run at a time.

        Args:
            rows: see :func:`batch`.
            known: ids of rows that are passed over.
        """
        source = find_input([rows], self._every).read() if isinstance(rows, (str, os.PathLike)) else rows
        run = Run(self.engine, self._preparer, source, self._defaults, self.n_parallel, known)
        return run.results()

    def close(self) -> None:
        """End llama-server."""
        self._end()

    def __enter__(self) -> BatchModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _config(prune: PruneConfig | Unset | None, mmproj: Path) -> PruneConfig:
    if prune is None:
        return PruneConfig(keep_ratio=1.0)  # whatever the mmproj file says
    if not isinstance(prune, Unset):
        return prune
    return get_default() or PruneConfig.from_metadata(read_gguf(mmproj).metadata) or PruneConfig()


def batch(
    rows: Rows,
    *,
    model: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
    **settings: Any,
) -> Iterator[BatchResult]:
    """Ask about many pictures, several at a time; a picture or row that cannot be used is a result with an error.

    Args:
        rows: a folder, a pattern or a file, as ``qap-gguf batch`` takes them; or rows, read as they are needed:
            pictures (paths, bytes, Pillow images, arrays) or mappings with `image`, `prompt`, `id` and settings of the
            row (docs/batch.md lists them). The id is the row's number, from 1, where it has none; that of a picture in
            a folder is its path in it.
        model, mmproj: GGUF files; None and None take the packaged pair.
        prompt: the question of rows that have none.
        settings: further arguments of :class:`qap_gguf.batch.BatchModel`.

    Returns:
        Results, in the order in which they are done. The model is loaded for the first one, and let go after the last
        one or when the iterator is closed.

    Raises:
        ConfigError, DataError, ModelFileError: a setting, an input or a file cannot be used, said where the first
            result is asked for; two rows have one id, said where the second one is read.

    Example:
        >>> import qap_gguf as qap
        >>> rows = [{"id": "a", "image": qap.packaged_model().sample}, {"id": "b", "image": "missing.png"}]
        >>> found = qap.batch(rows, prompt="How many objects are there?", prune=None, n_ctx=512, n_threads=1)
        >>> for row in sorted(found, key=lambda row: row.id):
        ...     print(row.id, row.answer or row.error)
        a four
        b image: expected a file, found none at 'missing.png'; check the path
    """
    with BatchModel(model, mmproj, prompt=prompt, **settings) as vlm:
        yield from vlm.run(rows)
