"""Measure an importance matrix on pictures with questions, as the model reads them after pruning, or on plain text.

llama-imatrix measures on text alone. A vision-language model spends most of its prefill on image rows, whose channels
differ (MBQ, arXiv 2412.19509). Answers are teacher-forced: the right one is read after its question, token by token, as
the model would read its own. Facts of the text: tools/imatrix/imatrix.cpp (chunks of n_ctx tokens, each begun with BOS,
the rest left out).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import llama_cpp

from qap_gguf import _core
from qap_gguf.arguments import check_integer, n_threads_default
from qap_gguf.config import PruneConfig
from qap_gguf.convert.output.imatrix_sums import ImatrixSums, weighted, write_sums
from qap_gguf.defaults import UNSET, Unset
from qap_gguf.errors import ConfigError, ConvertError, DataError
from qap_gguf.eval.data import Question, load_questions
from qap_gguf.eval.imatrix_state import State
from qap_gguf.files.gguf import check_language
from qap_gguf.files.journal import fingerprint
from qap_gguf.files.regular import read_text
from qap_gguf.files.trial import check_trial
from qap_gguf.language.collector import KINDS, Collector, Sums
from qap_gguf.language.kv_types import kv_settings
from qap_gguf.language.likelihood import answer_tokens
from qap_gguf.language.llama import LanguageModel
from qap_gguf.language.opener import open_language, open_llama
from qap_gguf.model import VisionModel
from qap_gguf.runtime.devices import language_settings
from qap_gguf.vision.encoder import max_image_tokens
from qap_gguf.vision.resize import default_resize

__all__ = ["ImatrixReport", "check_weights", "measure_imatrix"]

CHUNK = 512  #: tokens of a piece of text, llama-imatrix's own
_SAVE_SECONDS = 60.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImatrixReport:
    """What was measured.

    Attributes:
        path: the imatrix file.
        n_entries: matrices in it.
        rows: rows of each kind that were read, the unweighted count of a matrix that sees all of them.
        n_pieces: pictures with their questions, or chunks of text.
        n_known: how many of them an earlier run had measured.
        prune: how pictures were pruned; None: not at all.
        seconds: of this run, without loading the model.
    """

    path: Path
    n_entries: int
    rows: Mapping[str, int]
    n_pieces: int
    n_known: int
    prune: PruneConfig | None
    seconds: float


class _Pieces(Protocol):
    """The data in pieces that are measured one after another, each from an empty KV cache."""

    def __len__(self) -> int: ...
    def read(self, number: int) -> None: ...


def check_weights(weights: Mapping[str, float] | None) -> tuple[float, ...]:
    """One weight for each kind of row; 1 where none is given.

    Raises:
        ConfigError: an unknown kind, a weight that is negative or not finite, or none above 0.

    Example:
        >>> check_weights({"image": 0.5})
        (0.5, 1.0, 1.0)
    """
    given = {} if weights is None else dict(weights)
    unknown = [kind for kind in given if kind not in KINDS]
    if unknown:
        raise ConfigError(f"weight: expected one of {', '.join(KINDS)}, got {unknown[0]!r}; choose one of these")
    found = tuple(float(given.get(kind, 1.0)) for kind in KINDS)
    if not all(0 <= weight <= 1e6 for weight in found) or not any(found):
        raise ConfigError(f"weight: expected numbers from 0 to 1e6, one of them above 0, got {given}; correct them")
    return found


def measure_imatrix(
    data: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    mmproj: str | Path | None = None,
    text: bool = False,
    prune: PruneConfig | Unset | None = UNSET,
    weights: Mapping[str, float] | None = None,
    limit: int | None = None,
    chunk: int = CHUNK,
    kv: str | None = None,
    n_ctx: int = 2048,
    n_batch: int = 512,
    n_threads: int | None = None,
    device: str | None = None,
    model_device: str | None = None,
    force: bool = False,
    check: str = "gate",
    save_seconds: float = _SAVE_SECONDS,
    progress: Progress | None = None,
    verbose: bool = False,
) -> ImatrixReport:
    """Measure how strongly each channel of a language model's matrices is used, and write llama-imatrix's file format.

    Beside `out` stands ``out.state``, from which the same call goes on after it was stopped, with the same result to
    the last bit. It stays there: with a larger `limit` or other weights nothing is measured twice.

    Args:
        data: a file of questions (see ``load_questions``; answers may be missing), or with `text` a plain text.
        out: the file to write. Without its state, one that is there is replaced with `force` only.
        model: the language model, best in F16; mmproj: its image encoder, not needed with `text`.
        prune: how pictures are pruned; unset is the file's or our default, None keeps all tokens.
        weights: how much a row of "image", "text" or "answer" counts, 1 where it is not said.
        limit: read the first pictures, with all of their questions, or chunks of text, only.
        chunk: tokens of a chunk of text, from 16 to `n_ctx`; llama-quantize is told that many for a chunk of anything.
        kv, n_ctx, n_batch, n_threads, device, model_device, check, verbose: see :class:`~qap_gguf.VisionModel`.
        save_seconds: how often the state is written, at the end of a piece.
        progress: called as progress(done, total) after each piece: a picture with its questions, or a chunk of text.

    Raises:
        DataError: the data cannot be read, or the state belongs to another measurement.
        ConfigError: an argument is outside its range, or a question does not fit `n_ctx`.
        ConvertError: `out` is there or cannot be written.
        Others: what loading the model, encoding and pruning raise.

    Example:
        >>> import json, tempfile
        >>> import qap_gguf as qap
        >>> files, folder = qap.packaged_model(), Path(tempfile.mkdtemp())
        >>> row = {"image": str(files.sample), "question": "How many objects are there?", "answer": "four"}
        >>> n = (folder / "q.jsonl").write_text(json.dumps(row))
        >>> report = measure_imatrix(
        ...     folder / "q.jsonl", folder / "imatrix.gguf", model=files.model, mmproj=files.mmproj, n_threads=1,
        ...     prune=qap.PruneConfig(n_keep=18),
        ... )
        >>> report.rows["image"], report.rows["answer"]
        (18, 1)
    """
    factors = check_weights(weights)
    source, target, path = Path(data), Path(out), Path(model)
    check_integer("n_ctx", n_ctx, 16)
    check_integer("chunk", chunk, 16, *([n_ctx] if text else []))
    if limit is not None:
        check_integer("limit", limit, 1)
    if mmproj is None and not text:
        raise ConfigError(
            "mmproj: expected a file for pictures, got none; give it, or text=True (--text) for plain text"
        )
    run: dict[str, Any] = {
        "data": fingerprint(source), "model": fingerprint(path), "text": text, "n_ctx": n_ctx, "n_batch": n_batch,
        "chunk": chunk, "kv": kv, "device": [device, model_device],
    }  # fmt: skip
    if not text and mmproj is not None:
        run |= {"mmproj": fingerprint(Path(mmproj)), "resize": default_resize(), "max_image_tokens": max_image_tokens()}
        run["stock_encoder"] = _core.stock_encoder()
    state_there = target.with_name(f"{target.name}.state").exists()
    if target.is_dir() or (target.exists() and not force and not state_there):
        raise ConvertError(f"expected no file {target}, found one; give force=True (--force) to overwrite it")
    if not target.parent.is_dir():
        raise ConvertError(f"expected a folder to write to, got {target.parent}; make it, or choose another -o")
    questions = [] if text else load_questions(source, need_answers=False)
    threads, place = n_threads or n_threads_default(), device if model_device is None else model_device
    with contextlib.ExitStack() as stack:
        pieces: _Pieces
        if text or mmproj is None:
            llama = _text_model(
                path, place, kv, check, n_threads=threads, n_ctx=n_ctx, n_batch=n_batch, verbose=verbose
            )
            stack.callback(llama.close)
            collector, config = Collector(llama), None
            pieces = _Text(llama, collector, source, chunk, limit)
        else:
            llama = open_language(
                path, mmproj, device=place, kv=kv, n_ctx=n_ctx, n_batch=n_batch,
                n_threads=threads, check=check, verbose=verbose,
            )  # fmt: skip
            stack.callback(llama.close)
            collector = Collector(llama)
            vlm = stack.enter_context(
                VisionModel(mmproj, llama, device=device, n_threads=threads, check="none", verbose=verbose)
            )
            config = vlm.choose(prune)
            pieces = _Pictures(vlm, collector, questions, config, limit)
        run["prune"] = None if config is None else config.to_dict()
        state = State(target, run, force=force)
        known = state.done
        if state.done > len(pieces):
            raise DataError(
                f"expected at most {len(pieces)} measured pieces (limit), got {state.done} in {state.path}; raise the "
                "limit, or choose another -o"
            )
        collector.start_from(state.sums)
        started = time.perf_counter()
        _measure(pieces, collector, state, save_seconds, progress)
        seconds = time.perf_counter() - started
    _write(target, state.sums, factors, str(data), chunk)
    rows = {kind: max(int(c[i].max()) for _, c in state.sums.values()) for i, kind in enumerate(KINDS)}
    return ImatrixReport(target, len(state.sums), rows, len(pieces), known, config, seconds)


def _measure(
    pieces: _Pieces, collector: Collector, state: State, save_seconds: float, progress: Progress | None
) -> None:
    saved = time.monotonic()
    for number in range(state.done, len(pieces)):
        pieces.read(number)
        collector.kind = None
        last = number + 1 == len(pieces)
        if last or time.monotonic() - saved >= save_seconds:
            collector.check()
            state.save(number + 1, collector.sums())
            saved = time.monotonic()
        if progress is not None:
            progress(number + 1, len(pieces))


def _write(path: Path, sums: Sums, weights: tuple[float, ...], data: str, chunk: int) -> None:
    entries = {name: weighted(values, counts, weights) for name, (values, counts) in sums.items()}
    if not any(counts.any() for _, counts in entries.values()):
        raise ConfigError("weight: expected rows with a weight above 0, got none; give another weight")
    write_sums(path, ImatrixSums(entries, (data,), chunk), force=True)


def _text_model(
    path: Path, device: str | None, kv: str | None, check: str, *, n_threads: int, **settings: Any
) -> llama_cpp.Llama:
    more = {**kv_settings(kv), **language_settings(device)}
    if check != "none":
        check_language(path, settings["n_ctx"])
    if check == "child":
        check_trial(None, path)
    return open_llama(path, n_threads=n_threads, n_threads_batch=n_threads, **settings, **more)


class _Pictures:
    """Each picture with all of its questions: its rows are read once, unless the questions keep other tokens."""

    def __init__(
        self,
        vlm: VisionModel,
        collector: Collector,
        questions: Sequence[Question],
        config: PruneConfig | None,
        limit: int | None,
    ) -> None:
        self._vlm, self._collector, self._config = vlm, collector, config
        groups: dict[Path, list[Question]] = {}
        for question in questions:
            groups.setdefault(question.image, []).append(question)
        self._groups = list(groups.items())[:limit]
        self._language = LanguageModel(vlm.language_model)

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, number: int) -> None:
        path, questions = self._groups[number]
        self._vlm.forget()
        image = self._vlm.encode(path, self._config)
        with self._language.observed(self._collector.see):
            for question in questions:
                generation = self._vlm.generate([image, question.text], prune=self._config, stream=True)
                if question.answer:
                    self._answer(question)
                generation.close()

    def _answer(self, question: Question) -> None:
        language = self._language
        tokens = answer_tokens(language, question.answer)
        if len(tokens) > language.room:
            raise ConfigError(
                f"answer: expected at most {language.room} tokens after the question, got {len(tokens)} for "
                f"{question.answer[:40]!r}; raise n_ctx (--ctx)"
            )
        as_answer = language.observed(lambda _: self._collector.see("answer"))
        with language.turns.lock, as_answer, language.interruptible():
            language.prefill(tokens)


class _Text:
    """Chunks of a text, each begun with BOS where the model has one; what is left at the end is not read."""

    def __init__(self, llama: llama_cpp.Llama, collector: Collector, path: Path, chunk: int, limit: int | None) -> None:
        self._language, self._collector = LanguageModel(llama), collector
        try:
            raw = read_text(path).encode()
        except (OSError, UnicodeDecodeError) as err:
            raise DataError(f"{path}: expected a readable text, got {err}; check the path") from err
        self._tokens = llama.tokenize(raw, add_bos=True, special=False)
        vocab: Any = llama._model.vocab
        self._bos = int(llama_cpp.llama_vocab_bos(vocab)) if llama_cpp.llama_vocab_get_add_bos(vocab) else None
        self._chunk = chunk
        self._count = len(self._tokens) // chunk if limit is None else min(limit, len(self._tokens) // chunk)
        if not self._count:
            raise DataError(
                f"{path}: expected a text of {chunk} tokens or more, got {len(self._tokens)}; give a longer one"
            )

    def __len__(self) -> int:
        return self._count

    def read(self, number: int) -> None:
        tokens = self._tokens[number * self._chunk : (number + 1) * self._chunk]
        if self._bos is not None:
            tokens[0] = self._bos
        language = self._language
        language.reset()
        with language.turns.lock, language.observed(self._collector.see), language.interruptible():
            language.prefill(tokens)
