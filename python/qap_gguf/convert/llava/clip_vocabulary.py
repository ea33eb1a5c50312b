"""CLIP's tokenizer from tokenizer.json, or from vocab.json and merges.txt: tokens, merges, special tokens.

Facts: transformers 5.23 tokenization_clip.py. pruning/clip_tokenizer.py does what is written there, so a
tokenizer.json that asks for something else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf.convert.source.checkpoint import read_json
from qap_gguf.errors import ConvertError
from qap_gguf.files.regular import read_text

__all__ = ["ClipVocabulary", "load_vocabulary"]

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_DEFAULTS = {"bos_token": _BEGIN, "eos_token": _END, "pad_token": _END, "unk_token": _END}
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PATTERNS = (_WORDS, r"<\|startoftext\|>|<\|endoftext\|>|" + _WORDS)
_NORMALIZERS = ["NFC", "Replace", "Lowercase"]


@dataclass(frozen=True)
class ClipVocabulary:
    """`tokens[i]` is the text of id i in the byte-level alphabet, "" where there is none; merges are "left right"."""

    tokens: list[str]
    merges: list[str]
    bos: int
    eos: int
    pad: int
    unknown: int
    special: list[int]  # found in a text verbatim


def load_vocabulary(folder: Path, n_vocab: int) -> ClipVocabulary:
    """The tokenizer in `folder`, with ids below `n_vocab`. Raises ConvertError for one of another kind than CLIP's."""
    added: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        data = read_json(folder / "tokenizer.json")
        ids, merges = _from_json(data)
        for entry in data.get("added_tokens") or []:
            if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
                raise ConvertError(f"expected added tokens without conditions, got {entry['content']!r}; not supported")
            added[str(entry["content"])] = entry["id"]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        ids, merges = read_json(folder / "vocab.json"), _merges_txt(folder / "merges.txt")
    else:
        raise ConvertError(
            f"expected tokenizer.json, or vocab.json and merges.txt, in {folder}, found neither; "
            "fetch the whole checkpoint"
        )
    ids = {**ids, **added}
    special = {name: _special(folder, name, ids) for name in _DEFAULTS}
    tokens = [""] * (max(ids.values(), default=-1) + 1) if _all_ids(ids, n_vocab) else []
    for text, number in ids.items():
        tokens[number] = text
    return ClipVocabulary(
        tokens, merges, special["bos_token"], special["eos_token"], special["pad_token"], special["unk_token"],
        sorted({*special.values(), *added.values()}),
    )  # fmt: skip


def _all_ids(ids: dict[str, Any], n_vocab: int) -> bool:
    for text, number in ids.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < n_vocab:
            raise ConvertError(
                f"expected token ids 0..{n_vocab - 1} as config.json's vocab_size says, got {number!r} of {text!r}; "
                "give the tokenizer that belongs to these weights"
            )
    return True


def _from_json(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    model = data["model"]
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise ConvertError(
            f"expected CLIP's BPE with </w> in tokenizer.json, got {model.get('type')!r} with "
            f"{model.get('end_of_word_suffix')!r}; give the tokenizer of a CLIP"
        )
    odd = [key for key in ("continuing_subword_prefix", "dropout", "fuse_unk", "ignore_merges") if model.get(key)]
    normalizer, steps = data.get("normalizer") or {}, (data.get("pre_tokenizer") or {}).get("pretokenizers") or []
    kinds = [step.get("type") for step in normalizer.get("normalizers") or []]
    pattern = (steps[0].get("pattern") or {}).get("Regex") if steps else None
    if odd or kinds != _NORMALIZERS or pattern not in _PATTERNS or [s.get("type") for s in steps[1:]] != ["ByteLevel"]:
        raise ConvertError(
            f"expected CLIP's normalizer and pattern in tokenizer.json, got {kinds} and {pattern!r}"
            f"{' with ' + ', '.join(odd) if odd else ''}; give the tokenizer of a CLIP"
        )
    return dict(model["vocab"]), [_merge(pair) for pair in model["merges"]]


def _merge(pair: Any) -> str:
    parts = pair.split(" ") if isinstance(pair, str) else list(pair)
    if len(parts) != 2 or not all(isinstance(part, str) and part and " " not in part for part in parts):
        raise ConvertError(f"expected merges of two tokens, got {pair!r}; fetch the checkpoint again")
    return " ".join(parts)


def _merges_txt(path: Path) -> list[str]:
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as err:
        raise ConvertError(f"cannot read {path} ({type(err).__name__}); fetch the checkpoint again") from err
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    return [_merge(line.rstrip("\r")) for line in lines if line.strip()]


def _special(folder: Path, name: str, ids: dict[str, Any]) -> int:
    """The id of a special token, by the name that the tokenizer's config gives it."""
    text: Any = None
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if text is None and (folder / file).is_file():
            text = read_json(folder / file).get(name)
    text = text.get("content") if isinstance(text, dict) else text
    text = _DEFAULTS[name] if text is None else text
    if text not in ids:
        raise ConvertError(f"expected {name} {text!r} in the vocabulary, found none; fetch the checkpoint again")
    return int(ids[text])
