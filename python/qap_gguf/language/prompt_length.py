"""A text that cannot fit the context is refused by its length, before it is tokenized.

libllama looks for each special token in all that is left of a text, again after each one that it finds: a text of
special tokens takes time by the square of its length, minutes for one that a client may send (llama-vocab.cpp,
``tokenizer_st_partition``). What is counted here instead, in one pass: each special token in the text is a token, and
what lies between them is no less than its length over the longest token's. Both are lower bounds, so that nothing is
refused that would have fit.
"""

from __future__ import annotations

import re
from functools import cached_property

import llama_cpp

from qap_gguf.errors import ConfigError
from qap_gguf.language.vocabulary import Vocabulary

_SPECIAL = (
    llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
)
#: Bytes that a token takes in most texts, or more: what is shorter than so many for each position is not counted.
_PLENTY = 2


class PromptLimit:
    """The shortest that a text can be in tokens, against the context of a model.

    Args:
        llama: the language model, or its vocabulary alone.
        n_ctx: tokens of the context; None is that of `llama`.

    Example:
        >>> import llama_cpp
        >>> import qap_gguf as qap
        >>> llm = llama_cpp.Llama(str(qap.packaged_model().model), n_ctx=512, verbose=False)
        >>> PromptLimit(llm).check("What is this?")
        >>> PromptLimit(llm).check("<|im_end|>" * 100_000)
        Traceback (most recent call last):
        qap_gguf.errors.ConfigError: prompt: expected at most 512 tokens (n_ctx), got at least 513; shorten it
        >>> llm.close()
    """

    def __init__(self, llama: llama_cpp.Llama | Vocabulary, n_ctx: int | None = None) -> None:
        self._llama = llama
        self._n_ctx = int(llama.n_ctx()) if n_ctx is None else n_ctx  # type: ignore[union-attr]

    @cached_property
    def _vocabulary(self) -> tuple[re.Pattern[str] | None, int]:
        """What finds the special tokens of a text, and the bytes of the longest other token."""
        vocab = self._llama._model.vocab
        special, longest = [], 1
        for token in range(int(self._llama.n_vocab())):
            text = llama_cpp.llama_vocab_get_text(vocab, token)
            if llama_cpp.llama_vocab_get_attr(vocab, token) & _SPECIAL:
                special.append(text.decode("utf-8", "replace"))
            longest = max(longest, len(text))
        texts = sorted(filter(None, special), key=len, reverse=True)  # as libllama: the longest first
        return (re.compile("|".join(map(re.escape, texts))) if texts else None), longest

    def at_least(self, text: str, most: int | None = None) -> int:
        """Tokens that `text` has or more; 0 for one that is short anyway. Counting ends above `most`."""
        if len(text) <= _PLENTY * self._n_ctx:
            return 0
        pattern, longest = self._vocabulary
        found, rest = 0, len(text.encode("utf-8", "replace"))
        for match in pattern.finditer(text) if pattern is not None else ():
            found += 1
            if most is not None and found > most:
                return found
            rest -= len(match[0].encode("utf-8", "replace"))
        return found + rest // longest

    def check(self, text: str, what: str = "prompt") -> None:
        """`text` may fit the context.

        Raises:
            ConfigError: it cannot.
        """
        n_ctx, found = self._n_ctx, self.at_least(text, self._n_ctx)
        if found > n_ctx:
            raise ConfigError(f"{what}: expected at most {n_ctx} tokens (n_ctx), got at least {found}; shorten it")

    def check_number(self, n_messages: int) -> None:
        """So many messages with text may fit the context: each is a token, or more.

        Raises:
            ConfigError: they cannot.
        """
        if n_messages > self._n_ctx:
            raise ConfigError(
                f"messages: expected at most {self._n_ctx} tokens (n_ctx), got {n_messages} messages with text; "
                "send fewer"
            )

    def check_turns(self, texts: list[list[str]]) -> None:
        """A conversation may fit the context.

        Args:
            texts: the texts of each turn.

        Raises:
            ConfigError: it cannot.
        """
        self.check_number(sum(any(parts) for parts in texts))
        self.check("".join(part for parts in texts for part in parts), "messages")
