"""CLIP's tokenizer, made by the ``tokenizers`` package (extra ``clip-text``) from the vocabulary in an mmproj file.

Facts: transformers 5.24 tokenization_clip.py has the normalizer, the pattern and the order of the steps. The keys
``qap_clip_text.tokenizer.*`` are written by convert/llava/clip_text.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qap_gguf.errors import ConfigError, ModelFileError

PREFIX = "qap_clip_text.tokenizer."
MAX_BYTES = 1 << 20  # of a prompt; far more than any context length
_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class ClipTokenizer:
    """CLIP's tokenizer for prompts of at most `n_ctx` tokens.

    Attributes:
        n_ctx: longest result, begin and end included, at least 3.
        bos, eos: ids of begin and end.
        texts: the ``tokenizers.Tokenizer``; None without the extra ``clip-text``.

    Example:
        >>> keys = {PREFIX + name: number for name, number in (("bos_token_id", 2), ("eos_token_id", 3))}
        >>> keys[PREFIX + "unknown_token_id"] = 3
        >>> arrays = {
        ...     PREFIX + "tokens": ["a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"],
        ...     PREFIX + "merges": [],
        ...     PREFIX + "special_token_ids": [2, 3],
        ... }
        >>> load_tokenizer(keys, arrays, n_ctx=5, n_vocab=4).ids("A b")
        [2, 0, 1, 3]
    """

    n_ctx: int
    bos: int
    eos: int
    texts: Any

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt: begin, at most ``n_ctx - 2`` of the text, end.

        Raises:
            ConfigError: `prompt` is no text, has lone surrogates or more than 1 MiB, or the extra is not installed.
        """
        _check_prompt(prompt)
        if self.texts is None:
            raise ConfigError(
                "semantic: expected the package tokenizers for clip_text, found none; run pip install "
                "'qap_gguf[clip-text]', or take another signal"
            )
        found: list[int] = self.texts.encode(prompt, add_special_tokens=False).ids
        return [self.bos, *found[: self.n_ctx - 2], self.eos]


def load_tokenizer(
    metadata: Mapping[str, Any], arrays: Mapping[str, list[Any]], *, n_ctx: int, n_vocab: int
) -> ClipTokenizer:
    """The tokenizer that an mmproj file stores.

    Args:
        metadata: key to value, as in :class:`qap_gguf.files.gguf.GgufInfo`.
        arrays: key to list, for the arrays of strings and of integers.
        n_ctx: the tower's context length.
        n_vocab: rows of the tower's token embedding.

    Raises:
        ModelFileError: a key is missing, of the wrong type, or contradicts the others. The path is not in the message.
    """
    tokens = _array(arrays, "tokens", str)
    if not 3 <= len(tokens) <= n_vocab:
        raise _refused(f"expected 3..{n_vocab} tokens, got {len(tokens)}")
    bos, eos, unknown = (_id(metadata, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "unknown"))
    special = _array(arrays, "special_token_ids", int)
    for number in (*special, unknown):
        if not 0 <= number < len(tokens) or not tokens[number]:
            raise _refused(f"expected a text for the special token {number}, found none")
    merges: list[tuple[str, str]] = []
    for merge in _array(arrays, "merges", str):
        left, _, right = str(merge).partition(" ")
        if not left or not right or " " in right:
            raise _refused(f"expected two tokens as merge {len(merges)}, got {merge!r}")
        merges.append((left, right))
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ImportError:
        return ClipTokenizer(n_ctx, bos, eos, None)
    vocabulary = {text: number for number, text in enumerate(tokens) if text}
    model = {"unk_token": tokens[unknown], "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    try:
        texts = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, **model))
        texts.add_special_tokens([AddedToken(tokens[number], special=True) for number in special])
    except Exception as err:  # what the package raises for an unknown token in a merge has no other class
        raise _refused(f"tokenizer.merges: expected merges of known tokens, got others ({err})") from err
    texts.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True)
    texts.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return ClipTokenizer(n_ctx, bos, eos, texts)


def _refused(what: str) -> ModelFileError:
    return ModelFileError(f"{what}; write the file again with qap-gguf convert --clip-text")


def _array(arrays: Mapping[str, list[Any]], name: str, kind: type) -> list[Any]:
    found = arrays.get(PREFIX + name)
    if found is None or not all(isinstance(item, kind) for item in found):
        raise _refused(f"expected an array of {'strings' if kind is str else 'i32'} as {PREFIX}{name}, found none")
    return found


def _id(metadata: Mapping[str, Any], name: str, n_tokens: int) -> int:
    number = metadata.get(PREFIX + name)
    if number is None:
        raise _refused(f"expected the key {PREFIX}{name}, found none")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < n_tokens:
        raise _refused(f"expected {PREFIX}{name} in 0..{n_tokens - 1}, got {number!r}")
    return number


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt: expected a str, got {type(prompt).__name__}; pass the question's text")
    try:
        n_bytes = len(prompt.encode("utf-8"))
    except UnicodeEncodeError as err:
        raise ConfigError("prompt: expected Unicode text, got a lone surrogate; decode the text as UTF-8") from err
    if n_bytes > MAX_BYTES:
        raise ConfigError(f"prompt: expected at most {MAX_BYTES} bytes, got {n_bytes}; shorten it")
