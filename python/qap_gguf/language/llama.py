"""The parts of ``llama_cpp.Llama`` that a vision model needs: prefill of text, tokens of an answer, KV cache.

All reliance on names of llama-cpp-python that are not public stands here; the pin keeps them in place.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from qap_gguf import _core
from qap_gguf.errors import ConfigError, NativeError
from qap_gguf.language.input_embeddings import InputEmbeddings
from qap_gguf.language.kv_record import IdArray, KvRecord, RecurrentState
from qap_gguf.language.sampling import checked
from qap_gguf.language.turn_lock import Turns
from qap_gguf.runtime.fork import check_process, note_threads

_PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY  # the recurrent part of a state alone


class LanguageModel:
    """A loaded ``llama_cpp.Llama`` with one sequence in its KV cache."""

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self.llama = llama
        if not self.is_open:
            raise ConfigError("model: expected an open llama_cpp.Llama, got a closed one; make a new one")
        if llama.model_params.vocab_only or llama.context_params.embeddings:
            raise ConfigError("model: expected a Llama that generates, got vocab_only or embedding; make another one")
        if llama.context_params.attention_type == llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL:
            raise ConfigError("attention_type: expected a Llama with causal attention, got another; leave it out")
        if not llama_cpp.llama_get_memory(llama._ctx.ctx):
            raise ConfigError("model: expected a language model that generates, got an encoder; take another file")
        self.check_process()
        note_threads(self.n_threads)
        self._shared = _share(llama)

    @property
    def n_threads(self) -> int:
        """CPU threads, the more of prefill and decoding."""
        return max(int(self.llama.n_threads), int(self.llama.n_threads_batch))

    def check_process(self) -> None:
        """The model can compute in this process.

        Raises:
            QapError: it has threads that a fork left behind.
        """
        check_process(self.n_threads)

    @property
    def is_open(self) -> bool:
        """False once its owner has closed the Llama: its addresses are gone then."""
        return self.llama._model.model is not None and self.llama._ctx.ctx is not None

    @property
    def model_address(self) -> int:
        """Address of the native ``llama_model``."""
        return int(self.llama._model.model)

    @property
    def context_address(self) -> int:
        """Address of the native ``llama_context``."""
        return int(self.llama._ctx.ctx)

    @property
    def n_past(self) -> int:
        """Positions in use: where the next token goes."""
        return int(self.llama.n_tokens)

    @n_past.setter
    def n_past(self, value: int) -> None:
        self.llama.n_tokens = value

    @property
    def n_ctx(self) -> int:
        """Cells that fit: libllama rounds the context up, llama-cpp-python's own buffers do not."""
        return self._shared.n_cells

    @property
    def room(self) -> int:
        """Tokens that can still be evaluated: one for each free cell, whatever the positions are (:meth:`fit`)."""
        return max(0, self.n_ctx - self.n_kv)

    @property
    def n_whole(self) -> int:
        """Rows that see each other and so must stand in one batch: how many fit."""
        context = self.llama._ctx.ctx
        return min(int(llama_cpp.llama_n_batch(context)), int(llama_cpp.llama_n_ubatch(context)))

    @property
    def n_kv(self) -> int:
        """Cells that the sequence occupies, after text: one for each token, whatever their positions are."""
        memory = llama_cpp.llama_get_memory(self.llama._ctx.ctx)
        return int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) + 1 + self.record.surplus

    @property
    def n_embd(self) -> int:
        """Width of a token inside the model."""
        return int(self.llama.n_embd())

    def jump(self, position: int, n_rows: int) -> None:
        """Go on at `position`, after `n_rows` cells were filled: M-RoPE gives an image fewer positions than cells, gaps
        between kept tokens more."""
        self.record.surplus += n_rows - (position - self.n_past)
        self.n_past = position
        self.fit()

    def fit(self) -> None:
        """Let llama-cpp-python, which takes positions for cells, fill the cells there are and no more."""
        llama: Any = self.llama
        surplus = self.record.surplus
        llama._n_ctx = self.n_ctx - surplus if surplus else int(llama.n_ctx())
        missing = self.n_ctx - surplus - len(llama.input_ids)
        if missing > 0:
            llama.input_ids = np.pad(llama.input_ids, (0, missing))
            if llama._logits_all:
                llama.scores = np.pad(llama.scores, ((0, missing), (0, 0)))

    @property
    def record(self) -> KvRecord:
        """What is known to be in the KV cache."""
        return self._shared.record

    @property
    def turns(self) -> Turns:
        """The lock of the Llama, and whose answer is in the making."""
        return self._shared.turns

    def holds(self, start: int, ids: IdArray) -> bool:
        """Whether the KV cache has what `ids` stand for at the positions from `start` on."""
        end = start + len(ids)
        return end <= self.n_past and np.array_equal(self.llama.input_ids[start:end], ids)

    @cached_property
    def is_recurrent(self) -> bool:
        """Whether layers keep one state for all tokens before, of which no token can be taken back: Qwen3.5, LFM2."""
        model = self.llama._model.model
        return bool(llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model))

    def cut(self, n_past: int) -> bool:
        """Take all from position `n_past` on out of the KV cache; False where the model cannot give back a part."""
        memory = llama_cpp.llama_get_memory(self.llama._ctx.ctx)
        if llama_cpp.llama_memory_seq_pos_max(memory, 0) < n_past - 1:
            return False
        if self.is_recurrent:
            state = self.record.state
            # what a sliding window has dropped cannot be told from what the state covers
            if llama_cpp.llama_model_n_swa(self.llama._model.model) > 0 or state is None or state.n_past != n_past:
                return False
            return self.restore(state)
        if llama_cpp.llama_memory_seq_pos_min(memory, 0) != 0:  # a sliding window drops what is old
            return False
        if not llama_cpp.llama_memory_seq_rm(memory, 0, n_past, -1):
            return False
        self.n_past = n_past
        return True

    def save(self) -> RecurrentState:
        """What the recurrent layers hold now, for :meth:`restore`.

        Raises:
            NativeError: libllama cannot write it.
        """
        context = self.llama._ctx.ctx
        size = int(llama_cpp.llama_state_seq_get_size_ext(context, 0, _PARTIAL))
        data = (ctypes.c_uint8 * size)()
        if size == 0 or llama_cpp.llama_state_seq_get_data_ext(context, data, size, 0, _PARTIAL) != size:
            raise NativeError(f"expected {size} bytes of the language model's state, got others; report this")
        return RecurrentState(data, self.n_past)

    def restore(self, state: RecurrentState) -> bool:
        """Go back to where the state was saved; what lies before must still be there. False where libllama cannot."""
        context = self.llama._ctx.ctx
        if not llama_cpp.llama_state_seq_set_data_ext(context, state.data, len(state.data), 0, _PARTIAL):
            return False
        if not llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, state.n_past, -1):
            return False
        self.n_past = state.n_past
        return True

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block Ctrl-C stops a native computation on the CPU too, not only what comes after it."""
        if self._shared.interruptible:
            yield
            return
        guard = _core.Interrupt(self.context_address, bool(self.llama.verbose))
        guard.watch()
        self._shared.interruptible = True
        try:
            yield
        except BaseException as err:
            stopped = guard.error()
            if stopped is not None:
                raise stopped from err
            raise
        finally:
            self._shared.interruptible = False
            guard.release(self.is_open)

    def reset(self) -> None:
        """Empty the KV cache."""
        self.llama.reset()  # type: ignore[no-untyped-call]
        self.llama._ctx.kv_cache_clear()  # type: ignore[no-untyped-call]

    def announce(self, kind: str) -> None:
        """Tell the observer, if there is one, what the rows of the next batches are: "image" or "text"."""
        if self._shared.observer is not None:
            self._shared.observer(kind)

    @contextlib.contextmanager
    def observed(self, observer: Callable[[str], None]) -> Iterator[None]:
        """Within the block `observer` hears of every batch of a prefill before it is evaluated."""
        before, self._shared.observer = self._shared.observer, observer
        try:
            yield
        finally:
            self._shared.observer = before

    def prefill(self, tokens: Sequence[int]) -> None:
        """Evaluate text tokens.

        Raises:
            NativeError: libllama refuses the batch.
        """
        self.announce("text")
        try:
            self.llama.eval(list(tokens))
        except RuntimeError as err:
            raise NativeError(f"prefill failed: {err}") from err

    def note(self, start: int, ids: IdArray) -> None:
        """Write down what stands at the positions from `start` on, where no text was evaluated."""
        self.llama.input_ids[start : start + len(ids)] = ids

    def synchronize(self) -> None:
        """Wait until the device has computed what was asked of it, so that times mean something."""
        llama_cpp.llama_synchronize(self.llama._ctx.ctx)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, special tokens as text."""
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=False))

    @cached_property
    def embedder(self) -> InputEmbeddings | None:
        """Input embeddings of this model's tokens, read from its file; None when it was not loaded from one."""
        path = Path(str(self.llama.model_path))
        if not path.is_file():
            return None
        return InputEmbeddings(path, self.tokenize, int(self.llama.n_embd()))

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self.llama._model.vocab, token))

    def last_logits(self) -> Any:
        """Logits of the last evaluated token, float32 (n_vocab,), copied."""
        logits = llama_cpp.llama_get_logits_ith(self.llama._ctx.ctx, -1)
        if not logits:
            raise NativeError("expected logits of the last token, got none; evaluate text first")
        return np.ctypeslib.as_array(logits, shape=(int(self.llama.n_vocab()),)).copy()

    def check_logits(self) -> None:
        """The last evaluated token has logits to choose from.

        Raises:
            NativeError: they are not finite, or all the same: products with quantized weights can turn NaN into zeros.
        """
        logits = self.last_logits()
        if not np.isfinite(logits).all() or logits.min() == logits.max():
            raise NativeError("expected finite logits that differ, got others; check the language model's file")

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What one step of an answer needs: Ctrl-C that works, and samplers that raise."""
        with self.interruptible(), checked(self.llama):
            yield

    def tokens(
        self, *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None
    ) -> Generator[int, None, None]:
        """Tokens after the prompt in the KV cache, the one that ends the answer among them.

        Each is drawn within :meth:`step`. `seed` None is the Llama's own.
        """
        llama = self.llama
        found = llama.generate(
            llama.input_ids[: llama.n_tokens].tolist(),
            top_k=top_k, top_p=top_p, min_p=min_p, temp=temperature, repeat_penalty=1.0,
        )  # fmt: skip
        usual = llama._seed
        llama._seed = usual if seed is None else seed
        try:
            first = next(found)  # makes the sampler
        finally:
            llama._seed = usual
        yield first
        yield from found


@dataclass
class _Shared:
    """What all users of one Llama share."""

    turns: Turns
    record: KvRecord
    n_cells: int
    interruptible: bool = False
    observer: Callable[[str], None] | None = None


def _share(llama: llama_cpp.Llama) -> _Shared:
    """The shared part of a Llama, made at its first use.

    Others may use the Llama between two of our answers. Text that they evaluate shows in ``input_ids``; images that a
    stock chat handler evaluates do not, but it calls ``reset`` before, and so the record is forgotten there.
    """
    found: _Shared | None = getattr(llama, "_qap_shared", None)
    if found is not None:
        return found
    shared = _Shared(Turns(), KvRecord(), min(int(llama.n_ctx()), len(llama.input_ids)))
    # no strong reference: a cycle would keep some GB until the garbage collector comes
    weak: Any = llama if isinstance(llama, weakref.ProxyType) else weakref.proxy(llama)

    def reset() -> None:
        shared.record.forget()
        weak._n_ctx = weak.n_ctx()
        weak.__class__.reset(weak)

    watched: Any = llama
    watched._qap_shared, watched.reset = shared, reset
    return shared


class TextStream:
    """Turns tokens into text piece by piece; a character spread over several tokens comes out whole."""

    def __init__(self, language: LanguageModel, stop: Sequence[str] = ()) -> None:
        stop = (stop,) if isinstance(stop, str) else stop  # a str is a sequence of its letters, which nobody means
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(f"stop: expected texts that are not empty, got {stop!r}; leave it out")
        self._language = language
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain after this token; "" while a stop text may be growing."""
        self._held += self._decoder.decode(self._language.llama.detokenize([token]))
        for text in self._stop:
            at = self._held.find(text)
            if at >= 0:
                self._held, self.stopped = self._held[:at], True
        return self._release(keep=0 if self.stopped else self._overlap())

    def finish(self) -> str:
        """What is still held back."""
        if not self.stopped:
            self._held += self._decoder.decode(b"", final=True)
        return self._release(keep=0)

    def _overlap(self) -> int:
        """Length of the longest tail that is the beginning of a stop text."""
        lengths = [n for text in self._stop for n in range(1, len(text)) if self._held.endswith(text[:n])]
        return max(lengths, default=0)

    def _release(self, keep: int) -> str:
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out
