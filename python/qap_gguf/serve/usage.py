"""How many tokens a streamed answer had, which its chunks do not say: OpenAI's ``stream_options.include_usage``.

llama-cpp-python counts in ``Llama.create_completion`` and tells it only of answers that are not streamed. All tokens
come out of ``Llama.generate``, so that is where they are counted here, in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp


@dataclass
class Usage:
    """Tokens of one answer, and of its prompt."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """As OpenAI's clients read it."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@contextlib.contextmanager
def counted(llama: llama_cpp.Llama) -> Iterator[Usage]:
    """Within the block, what `llama` generates is counted; nobody else may use it meanwhile."""
    usage, generate = Usage(), llama.generate

    def counting(tokens: Sequence[int], **settings: Any) -> Generator[int, Sequence[int] | None, None]:
        usage.prompt_tokens = len(tokens)
        for token in generate(tokens, **settings):
            if not llama_cpp.llama_vocab_is_eog(llama._model.vocab, token):
                usage.completion_tokens += 1
            yield token

    patched: Any = llama
    patched.generate = counting
    try:
        yield usage
    finally:
        del patched.generate


def with_usage(chunks: Iterator[dict[str, Any]], usage: Usage) -> Iterator[dict[str, Any]]:
    """The chunks of a stream, and one behind them with its counts and no choice."""
    last: dict[str, Any] = {}
    try:
        for chunk in chunks:
            last = chunk
            yield {**chunk, "usage": None}
    finally:
        close = getattr(chunks, "close", None)
        if close is not None:
            close()
    yield {**last, "choices": [], "usage": usage.to_dict()}
