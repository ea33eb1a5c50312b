"""Byte-level BPE tokenizers (GPT-2, SmolLM, Llama 3, Qwen2, tekken, ...) from tokenizer.json.

llama.cpp knows a pre-tokenizer, which cuts text into words before the merges, by a name only. So its name is found here
from the *structure* in tokenizer.json: the model's name would mislead where someone saved a changed tokenizer.
Facts: src/llama-vocab.cpp (names, regular expressions, `ignore_merges` of each name).
"""

from __future__ import annotations

import json
from typing import Any

from qap_gguf.convert.tokenizers.vocabulary import NORMAL, Vocabulary
from qap_gguf.errors import ConvertError

__all__ = ["DIFFERENCES", "PRE_TOKENIZERS", "from_json", "pre_tokenizer"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (steps of the pre-tokenizer, ignore_merges) -> the name in llama.cpp that does the same, but for DIFFERENCES. Only
# names whose ids were compared; gpt-4o is left out.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes+words",), False): "gpt-2",
    (("digits", "bytes+words"), False): "smollm",
    ((f"split {_LLAMA3}", "bytes"), True): "llama-bpe",
    ((f"split {_LLAMA3}", "bytes"), False): "smaug-bpe",
    ((f"split {_QWEN2}", "bytes"), False): "qwen2",
    ((f"split {_TEKKEN}", "bytes"), True): "tekken",
}

#: name in llama.cpp -> a note of one line: which text it splits otherwise than the tokenizer did in training. With
#: tekken it takes every letter but a-z for a capital, every one but A-Z for a small one, and no mark into a word.
DIFFERENCES = {
    "tekken": "tekken tokenizer: llama.cpp splits words with combining marks (Devanagari, Thai, vowel signs), and "
    "words of accented, Greek or Cyrillic letters with a capital after the first letter (F\u00dcR), otherwise than in "
    "training; all other text gets the same tokens",
}


def from_json(data: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a parsed tokenizer.json (a dict), without its added tokens.

    Raises ConvertError for an unknown pre-tokenizer.
    """
    model = data["model"]
    vocab = Vocabulary("gpt2", pre_tokenizer(data))
    for token, number in model["vocab"].items():
        vocab.put(int(number), token, NORMAL)
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else list(merge)
        if len(parts) != 2 or not all(isinstance(p, str) and p and " " not in p for p in parts):
            raise ConvertError(
                f"expected merges of two tokens in tokenizer.json, got {merge!r}; fetch the checkpoint again"
            )
        vocab.merges.append(" ".join(parts))
    if not vocab.merges:  # an empty list cannot be stored, and llama.cpp refuses a file without one
        raise ConvertError("expected merges in tokenizer.json, got none; fetch the checkpoint again")
    return vocab


def pre_tokenizer(data: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json.

    Example:
        >>> pre_tokenizer({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "model": {}})
        'gpt-2'
    """
    normalizer = data.get("normalizer")
    kind = normalizer.get("type") if isinstance(normalizer, dict) else None
    # llama.cpp has no NFC. Text is nearly always NFC already, so it is let pass, as llama.cpp's own conversion does.
    if kind not in (None, "NFC"):
        raise ConvertError(
            f"expected no normalizer or NFC in tokenizer.json, got {kind!r}; llama.cpp's BPE knows no other"
        )
    steps = tuple(_steps(data.get("pre_tokenizer")))
    ignore = bool(data["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((steps, ignore))
    if name is None:
        raise ConvertError(
            f"expected a pre-tokenizer like that of {', '.join(PRE_TOKENIZERS.values())}, got the unknown "
            f"{json.dumps(steps)} with "
            f"ignore_merges {ignore} in tokenizer.json; llama.cpp would tokenize differently, so it is refused"
        )
    return name


def _steps(node: Any) -> list[str]:
    """A pre-tokenizer as a flat list of steps; two structures that do the same give the same list."""
    if not isinstance(node, dict):
        return []
    kind = node.get("type")
    if kind == "Sequence":
        return [step for part in node.get("pretokenizers", []) for step in _steps(part)]
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return ["bytes+words" if node.get("use_regex", True) else "bytes"]
    if kind == "Digits" and node.get("individual_digits"):
        return ["digits"]
    pattern = node.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    # Keeping the matches, and removing what lies between them, are the same for an expression that matches everything.
    if (
        kind == "Split"
        and regex
        and (node.get("behavior"), bool(node.get("invert"))) in (("Isolated", False), ("Removed", True))
    ):
        return [f"split {regex}"]
    return [json.dumps(node, sort_keys=True)]
