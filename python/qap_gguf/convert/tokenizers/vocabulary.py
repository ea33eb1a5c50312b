"""The vocabulary record that the tokenizer readers fill.

Token types are those of llama.cpp and of sentencepiece (the same numbers).
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "Vocabulary"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Vocabulary:
    """`model` is "gpt2" (BPE with merges) or "llama" (sentencepiece with scores); `tokens[i]` is the text of id i."""

    model: str
    pre: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # sentencepiece only
    merges: list[str] = field(default_factory=list)  # BPE only: "left right"
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool | None = None
    unknown: int | None = None
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, unk, pad
    chat_template: str | None = None

    def put(self, token: int, text: str, kind: int, score: float = -1000.0) -> None:
        """Sets id `token`, growing the lists with empty entries where needed. An unknown token stays one."""
        grow = token + 1 - len(self.tokens)
        if grow > 0:
            self.tokens += [""] * grow
            self.types += [UNUSED] * grow
            self.scores += [-1000.0] * grow if self.model == "llama" else []
        fresh = not self.tokens[token]
        self.tokens[token] = text
        self.types[token] = UNKNOWN if token == self.unknown else kind
        if self.model == "llama" and fresh:
            self.scores[token] = score
