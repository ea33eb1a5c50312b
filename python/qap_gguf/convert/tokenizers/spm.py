"""Llama's sentencepiece tokenizers, from tokenizer.json (BPE with byte fallback) or tokenizer.model.

llama.cpp merges the neighbours whose joined text has the highest score. tokenizer.json has ranked merges instead, so a
token's score is minus the rank of its first merge. That is the same algorithm only if *every* way to split a token into
two others is a merge, side by side in the ranking; Llama's files are made so, and others are refused.
Facts: src/llama-vocab.cpp (llm_tokenizer_spm), sentencepiece's sentencepiece_model.proto (field numbers),
transformers' generate_merges.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qap_gguf.convert.tokenizers.vocabulary import BYTE, NORMAL, UNKNOWN, Vocabulary
from qap_gguf.errors import ConvertError
from qap_gguf.files.regular import read_regular

__all__ = ["SPACE", "from_json", "from_model"]

SPACE = "\u2581"  # sentencepiece's visible space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BPE = 2  # trainer_spec.model_type


def from_json(data: dict[str, Any], model: Path | None = None) -> Vocabulary:
    """The vocabulary of a parsed tokenizer.json (a dict), without its added tokens.

    `model`: a tokenizer.model with the real scores.
    """
    vocab = Vocabulary("llama", "default")
    vocab.add_space_prefix = _space_prefix(data)
    entries: dict[str, int] = data["model"]["vocab"]
    if not all(f"<0x{i:02X}>" in entries for i in range(256)):
        raise ConvertError(
            "expected all 256 byte tokens <0x00>..<0xFF> in tokenizer.json, got fewer; "
            "llama.cpp needs them for byte fallback"
        )
    unknown = data["model"].get("unk_token")
    vocab.unknown = entries.get(unknown) if isinstance(unknown, str) else None
    added = {int(entry["id"]) for entry in data.get("added_tokens") or []}
    if model is not None:
        scores = _model_scores(model, entries, added)
    else:
        scores = _merge_scores(data["model"]["merges"], entries, added)
    lowest = min(scores.values(), default=0.0) - 1.0
    for text, token in entries.items():
        vocab.put(int(token), text, BYTE if _BYTE.fullmatch(text) else NORMAL, scores.get(text, lowest))
    return vocab


def _space_prefix(data: dict[str, Any]) -> bool:
    """Whether a space goes in front of the text.

    Raises ConvertError for anything that is not Llama's treatment of spaces.
    """
    steps: list[dict[str, Any]] = []
    for kind, children in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        node = data.get(kind) or {}
        steps += node.get(children, []) if node.get("type") == "Sequence" else [node] if node else []
    prefix, spaces = False, False
    for step in steps:
        name = step.get("type")
        if name == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif name == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            spaces = True
        elif name == "Metaspace" and step.get("replacement") == SPACE:
            prefix, spaces = step.get("prepend_scheme", "always") != "never", True
            if step.get("split", True) and any(SPACE in text[1:] for text in data["model"]["vocab"]):
                raise ConvertError(
                    "expected a Metaspace that does not split, got one that does beside tokens with inner spaces; "
                    "llama.cpp would join them"
                )
        else:
            raise ConvertError(
                f"expected Llama's Prepend, Replace or Metaspace in tokenizer.json, got {name!r}; "
                "llama.cpp would tokenize differently"
            )
    if not spaces:
        raise ConvertError(
            "expected a tokenizer.json that replaces spaces by U+2581, got one that does not; "
            "llama.cpp would tokenize differently"
        )
    return prefix


def _merge_scores(merges: list[Any], entries: dict[str, int], added: set[int]) -> dict[str, float]:
    """Token -> minus the rank of its first merge, after the proof that scores say the same as merges."""
    first: dict[str, int] = {}
    pairs: set[tuple[str, str]] = set()
    last = ""
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        joined = left + right
        if joined != last and joined in first:
            raise ConvertError(
                f"expected all merges to {joined!r} side by side in tokenizer.json, got others between; "
                "add the tokenizer.model"
            )
        first.setdefault(joined, rank)
        pairs.add((left, right))
        last = joined
    for text, token in entries.items():
        if token in added or _BYTE.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            if text[:cut] in entries and text[cut:] in entries and (text[:cut], text[cut:]) not in pairs:
                raise ConvertError(
                    f"expected a merge of {text[:cut]!r} and {text[cut:]!r} in tokenizer.json, found none: llama.cpp's "
                    f"sentencepiece tokenizer would merge them; add the tokenizer.model that it was made from"
                )
    return {text: -float(rank) for text, rank in first.items()}


def _model_scores(model: Path, entries: dict[str, int], added: set[int]) -> dict[str, float]:
    """Token -> score in tokenizer.model, after the proof that both files speak of the same tokens."""
    other = from_model(model)
    for text, token in entries.items():
        if token < len(other.tokens) and token not in added and other.tokens[token] != text:
            raise ConvertError(
                f"expected the same token {token} in tokenizer.json and tokenizer.model, got {text!r} and "
                f"{other.tokens[token]!r}; "
                f"remove the file that does not belong to the weights"
            )
    return dict(zip(other.tokens, other.scores, strict=True))


def from_model(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.model (a sentencepiece BPE model with byte fallback)."""
    vocab = Vocabulary("llama", "default")
    try:
        for number, body in _fields(read_regular(path)):
            if number == 1:  # repeated SentencePiece pieces: 1 piece, 2 score, 3 type
                piece = dict(_fields(body))
                kind = piece.get(3, NORMAL)
                if kind == UNKNOWN:
                    vocab.unknown = len(vocab.tokens)
                vocab.put(
                    len(vocab.tokens),
                    piece[1].decode("utf-8"),
                    kind,
                    struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0,
                )
            elif number == 2:
                _check_trainer(dict(_fields(body)))
            elif number == 3:
                vocab.add_space_prefix = _check_normalizer(dict(_fields(body)))
    except (OSError, IndexError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError) as err:
        raise ConvertError(
            f"expected a sentencepiece model in {path}, got something else; fetch the checkpoint again"
        ) from err
    if sum(kind == BYTE for kind in vocab.types) != 256:
        raise ConvertError(f"expected all 256 byte tokens in {path}, got fewer; llama.cpp needs them for byte fallback")
    return vocab


def _check_trainer(spec: dict[int, Any]) -> None:
    if spec.get(3, 1) != _BPE:
        raise ConvertError(
            f"expected a BPE sentencepiece model, got model_type {spec.get(3, 1)}; "
            "llama.cpp's Llama tokenizer knows no other"
        )


def _check_normalizer(spec: dict[int, Any]) -> bool:
    """Fields: 1 name, 2 charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces."""
    if spec.get(2) or spec.get(4, 1) or not spec.get(5, 1):
        raise ConvertError(
            "expected Llama's normalizer (identity, extra spaces kept) in tokenizer.model, got another; "
            "llama.cpp would tokenize differently"
        )
    return bool(spec.get(3, 1))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs of one protobuf message: int for varints, bytes for the rest.

    Raises IndexError when cut short.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            item, at = _varint(data, at)
            yield key >> 3, item
            continue
        size = 8 if wire == 1 else 4
        if wire == 2:
            size, at = _varint(data, at)
        elif wire not in (1, 5):
            raise IndexError(f"wire type {wire}")
        if at + size > len(data):
            raise IndexError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
