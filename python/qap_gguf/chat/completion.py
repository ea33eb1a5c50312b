"""Between a chat handler and ``Llama.create_completion``: settings checked before native code, and what it lacks.

Facts read in llama-cpp-python 0.3.36, llama.py: ``logits_processor`` together with ``logit_bias`` loses both (the
result of ``list.extend`` is kept), a bias for an unknown token raises inside a callback, where it is lost, and a draft
model copies ids out of ``input_ids``, which for images are negative (:mod:`qap_gguf.generation.prefill`).
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from qap_gguf.arguments import check_integer, check_number, is_unicode
from qap_gguf.chat.tool_answers import special_as_text
from qap_gguf.errors import ConfigError
from qap_gguf.generation.answers import Answers

_FRACTIONS = ("top_p", "min_p", "typical_p")
_NUMBERS = ("presence_penalty", "frequency_penalty", "repeat_penalty", "tfs_z", "mirostat_tau", "mirostat_eta")


def check_settings(
    llama: llama_cpp.Llama,
    sampling: Mapping[str, Any],
    stop: str | Sequence[str] | None,
    logprobs: bool | None,
    top_logprobs: int | None,
) -> list[str]:
    """Settings of ``create_chat_completion``; returns the stop texts as a list.

    Raises:
        ConfigError: one has the wrong type or is outside its range.
    """
    check_number("temperature", sampling["temperature"], math.inf)
    for name in _FRACTIONS:
        check_number(name, sampling[name], 1.0)
    for name in _NUMBERS:
        value = sampling[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{name}: expected a finite number, got {value!r}; choose one")
    if not sampling["repeat_penalty"] > 0:
        raise ConfigError(f"repeat_penalty: expected a number above 0, got {sampling['repeat_penalty']!r}; 1 is none")
    check_integer("top_k", sampling["top_k"], -(2**31))
    check_integer("mirostat_mode", sampling["mirostat_mode"], 0, 2)
    for name, low, high in (("max_tokens", -(2**31), 2**31 - 1), ("seed", -(2**31), 2**32 - 1)):
        if sampling[name] is not None:
            check_integer(name, sampling[name], low, high)
    if top_logprobs is not None:
        check_integer("top_logprobs", top_logprobs, 0, int(llama.n_vocab()))
    if logprobs and not llama._logits_all:
        raise ConfigError("logprobs: expected a Llama made with logits_all=True, got one without; make another")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(text, str) and text and is_unicode(text) for text in stops):
        raise ConfigError(f"stop: expected Unicode texts that are not empty, got {stop!r}; leave it out")
    return stops


def merge_bias(llama: llama_cpp.Llama, processors: Any, bias: Mapping[Any, float] | None) -> Any:
    """Logits processors that apply a bias as well; None where there is neither.

    Raises:
        ConfigError: the bias names no token of the model, or is no number.
    """
    if not bias:
        return processors
    try:
        pairs = [(int(token), float(value)) for token, value in bias.items()]
    except (AttributeError, TypeError, ValueError) as err:
        raise ConfigError(f"logit_bias: expected token ids and numbers, got {str(bias)[:80]!r}; check it") from err
    n_vocab = int(llama.n_vocab())
    for token, value in pairs:
        if not 0 <= token < n_vocab or not -1e4 <= value <= 1e4:
            raise ConfigError(
                f"logit_bias: expected tokens 0..{n_vocab - 1} and numbers up to 10000, got {token}: {value}; check it"
            )
    ids, values = np.array([t for t, _ in pairs]), np.array([v for _, v in pairs], dtype=np.float32)

    def apply(_ids: npt.NDArray[np.intc], logits: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        out = np.copy(logits)
        out[ids] += values
        return out

    return llama_cpp.LogitsProcessorList([*(processors or ()), apply])


class HeldSignals:
    """Keeps Ctrl-C out of native callbacks, where an exception is printed and lost.

    Logits processors are Python that native code calls. While one may run, a signal is only noted; the next token ends
    the completion (this is its stopping criterion), and the signal's own handler is called after it.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[int, FrameType | None]] = []

    def __call__(self, _ids: npt.NDArray[np.intc], _logits: npt.NDArray[np.single]) -> bool:
        """Whether to stop, as a member of a ``StoppingCriteriaList``."""
        return bool(self._noted)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Note signals within the block, and raise after it what they raise."""
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler) or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, lambda number, frame: self._noted.append((number, frame)))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            if self._noted:
                number, frame = self._noted[0]
                self._noted.clear()
                handler(number, frame)


class _TextDrafts:
    """A draft model whose drafts end where they would run into an image, or out of the context."""

    def __init__(self, draft: Any) -> None:
        self.draft = draft
        self.answers: Answers | None = None  # that of the answer in the making

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **settings: Any) -> npt.NDArray[np.intc]:
        tokens: npt.NDArray[np.intc] = np.asarray(self.draft(input_ids, **settings))
        if self.answers is not None:
            tokens = tokens[: max(0, self.answers.room - 1)]
        return tokens[: int((tokens < 0).argmax())] if (tokens < 0).any() else tokens


def only_text_drafts(llama: llama_cpp.Llama, answers: Answers) -> None:
    """Keep a draft model, where there is one, from proposing an image's ids as tokens, or more tokens than fit."""
    if llama.draft_model is None:
        return
    wrapped: Any = llama.draft_model if isinstance(llama.draft_model, _TextDrafts) else _TextDrafts(llama.draft_model)
    wrapped.answers = answers
    llama.draft_model = wrapped


def fitting_tokens(answers: Answers, max_tokens: int | None) -> int:
    """`max_tokens`, or what the context has cells for where that is less: llama-cpp-python counts positions."""
    return answers.room if max_tokens is None or max_tokens <= 0 else min(max_tokens, answers.room)


def complete(
    answers: Answers,
    llama: llama_cpp.Llama,
    number: int,
    prompt: str | list[int],
    *,
    stream: bool,
    logits_processor: Any,
    markers: Sequence[str] = (),
    **settings: Any,
) -> Any:
    """``Llama.create_completion`` for the answer `number`, each of its steps within what every answer's steps need.

    Args:
        prompt: text, or the tokens in the KV cache.
        stream: return an iterator of chunks.
        logits_processor: from :func:`merge_bias`.
        markers: special tokens that come out as text.
        settings: further arguments of ``create_completion``.
    """
    only_text_drafts(llama, answers)
    signals = HeldSignals() if logits_processor else None

    shown = special_as_text(llama, markers)

    @contextlib.contextmanager
    def step() -> Iterator[None]:
        with answers.step(), shown(), signals.hold() if signals is not None else contextlib.nullcontext():
            yield

    with step():
        completion: Any = llama.create_completion(
            prompt,
            stream=stream,
            logits_processor=logits_processor,
            stopping_criteria=llama_cpp.StoppingCriteriaList([signals]) if signals is not None else None,
            **settings,
        )
    return answers.turns.stream(number, completion, step) if stream else completion
