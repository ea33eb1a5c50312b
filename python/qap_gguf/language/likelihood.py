"""How likely a language model finds texts as the beginning of its answer: what multiple choice is scored by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from qap_gguf.errors import ConfigError, NativeError
from qap_gguf.language.llama import LanguageModel


def answer_tokens(language: LanguageModel, text: str) -> list[int]:
    """Tokens of a text where an answer begins.

    What follows a colon ("ASSISTANT:" of LLaVA-1.5, "Assistant:" of SmolVLM) begins with a space; after a line break or
    a special token the answer follows at once. SentencePiece vocabularies put that space in by themselves.
    """
    llama = language.llama
    sentencepiece = llama_cpp.llama_vocab_type(llama._model.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_SPM
    last = [token for token in llama.input_ids[llama.n_tokens - 1 : llama.n_tokens].tolist() if token >= 0]
    after_colon = llama.detokenize(last).endswith(b":") if last else False
    return language.tokenize(f" {text}" if after_colon and not sentencepiece else text)


def _log_softmax(logits: Any) -> Any:
    wide = np.asarray(logits, np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())


def likelihoods(llama: llama_cpp.Llama, texts: Sequence[str]) -> list[float]:
    """Mean log probability, for each token, of texts as the answer to the prompt that was prefilled last.

    The mean, not the sum, so that a long choice is not at a disadvantage. The KV cache is left as it was found; the
    logits are not, so the answer must not be read on.

    Args:
        llama: a model after a prefill, such as ``VisionModel.language_model`` after ``generate(..., stream=True)``.
        texts: at least one, none empty.

    Returns:
        One number <= 0 for each text.

    Raises:
        ConfigError: no texts, or one without tokens, or no room for them in the context.
        NativeError: nothing was prefilled, or libllama refuses.

    Example:
        >>> import qap_gguf as qap
        >>> with qap.VisionModel() as vlm:
        ...     question = [qap.packaged_model().sample, "How many objects are there?"]
        ...     answer = vlm.generate(question, prune=None, stream=True)
        ...     found = likelihoods(vlm.language_model, ["two", "four", "six"])
        >>> max(zip(found, ["two", "four", "six"]))[1]
        'four'
    """
    language = LanguageModel(llama)
    tokens = [answer_tokens(language, text) for text in texts]
    if not tokens or not all(tokens):
        raise ConfigError(f"choices: expected texts with at least one token, got {list(texts)!r}; correct them")
    start, most = language.n_past, max(map(len, tokens))
    if most > language.room:
        raise ConfigError(
            f"choices: expected room for {most} tokens, got {language.room} of n_ctx {language.n_ctx}; raise n_ctx"
        )
    with language.turns.lock, language.interruptible():
        return _means(language, tokens, start)


def _means(language: LanguageModel, tokens: Sequence[list[int]], start: int) -> list[float]:
    first = _log_softmax(language.last_logits())
    memory = llama_cpp.llama_get_memory(language.llama._ctx.ctx)
    state = language.save() if language.is_recurrent and max(map(len, tokens)) > 1 else None
    out = []
    for ids in tokens:
        total, after = float(first[ids[0]]), ids[0]
        for token in ids[1:]:
            language.prefill([after])
            total, after = total + float(_log_softmax(language.last_logits())[token]), token
        if len(ids) > 1:
            taken = llama_cpp.llama_memory_seq_rm(memory, 0, start, -1) if state is None else language.restore(state)
            if not taken:
                raise NativeError("expected to take tokens back out of the KV cache, libllama cannot for this model")
            language.n_past = start
        out.append(total / len(ids))
    return out
