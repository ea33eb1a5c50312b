"""A checkpoint's tokenizer as llama.cpp stores it: tokens, types, scores or merges, special ids, chat template.

Facts: src/llama-vocab.cpp (what is read, its defaults, how special tokens are found),
tokenizers' tokenizer.json,
transformers 5.23 tokenization_utils_tokenizers.py (add_bos_token in tokenizer_config.json wins over the post-
processor).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qap_gguf.convert.llava.spec import TextSpec
from qap_gguf.convert.source.checkpoint import read_json
from qap_gguf.convert.tokenizers import bpe, spm
from qap_gguf.convert.tokenizers.vocabulary import CONTROL, UNUSED, USER_DEFINED, Vocabulary
from qap_gguf.errors import ConvertError
from qap_gguf.files.regular import read_text

__all__ = ["Vocabulary", "load"]

# Names under which llama.cpp looks for the end of a turn; ours is written explicitly, because it would take any of
# them.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "<end_of_utterance>",
)


def load(folder: Path, text: TextSpec) -> Vocabulary:
    """The vocabulary in `folder`, padded to the model's `n_vocab`.

    Raises ConvertError for a kind that llama.cpp lacks.
    """
    config = _optional(folder / "tokenizer_config.json")
    data, model = _optional(folder / "tokenizer.json"), folder / "tokenizer.model"
    if data:
        check_json(data, text.n_vocab)
    if data and not data["model"].get("byte_fallback"):
        vocab = bpe.from_json(data)
    elif data:
        vocab = spm.from_json(data, model if model.is_file() else None)
    elif model.is_file():
        vocab = spm.from_model(model)
    else:
        raise ConvertError(
            f"expected tokenizer.json or tokenizer.model in {folder}, found neither; fetch the whole checkpoint"
        )
    _added_tokens(vocab, text.n_vocab, data, config, _optional(folder / "added_tokens.json"))
    _pad(vocab, text.n_vocab)
    vocab.chat_template = _chat_template(folder, config)
    _special(
        vocab, config, _optional(folder / "special_tokens_map.json"), _optional(folder / "generation_config.json"), text
    )
    _begin_and_end(vocab, data, config)
    return vocab


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def check_json(data: dict[str, Any], n_vocab: int) -> None:
    """Raises ConvertError unless `data` is a tokenizer.json with a BPE model and ids below `n_vocab`."""
    model = data.get("model")
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        kind = model.get("type") if isinstance(model, dict) else None
        raise ConvertError(
            f"expected a BPE model in tokenizer.json, got {kind!r}; Llama tokenizers are BPE, others are not supported"
        )
    if (
        model.get("type", "BPE") != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        raise ConvertError(
            f"expected plain BPE in tokenizer.json, got type {model.get('type')!r} with dropout or affixes; "
            f"llama.cpp knows no such tokenizer"
        )
    numbers = [*model["vocab"].values(), *(entry.get("id") for entry in data.get("added_tokens") or [])]
    for number in numbers:
        _check_id(number, n_vocab)


def _check_id(token: Any, n_vocab: int) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n_vocab:
        raise ConvertError(
            f"expected token ids 0..{n_vocab - 1} as config.json's vocab_size says, got {token!r} in the tokenizer; "
            f"give the tokenizer that belongs to these weights"
        )


def _added_tokens(
    vocab: Vocabulary, n_vocab: int, data: dict[str, Any], config: dict[str, Any], older: dict[str, Any]
) -> None:
    """Lays the added tokens over the vocabulary: special ones as control tokens, the others as user-defined ones."""
    added: dict[int, tuple[str, bool]] = {}
    for content, token in older.items():  # added_tokens.json: {"<image>": 32000}
        if isinstance(token, int):
            added[token] = (content, False)
    entries = [(int(i), e) for i, e in (config.get("added_tokens_decoder") or {}).items()]
    entries += [(int(e["id"]), e) for e in data.get("added_tokens") or []]
    for token, entry in entries:  # the last one wins: it is what transformers loads
        added[token] = (str(entry["content"]), bool(entry.get("special")))
    for token, (content, special) in sorted(added.items()):
        _check_id(token, n_vocab)
        vocab.put(token, content if special else content.replace(spm.SPACE, " "), CONTROL if special else USER_DEFINED)


def _pad(vocab: Vocabulary, n_vocab: int) -> None:
    """Fills ids that no token has, up to the embedding's rows, with unused tokens; llama.cpp wants one for each row."""
    _check_id(len(vocab.tokens) - 1, n_vocab)
    for token in range(n_vocab):
        if token >= len(vocab.tokens) or not vocab.tokens[token]:
            vocab.put(token, f"[PAD{token}]", UNUSED)
    if len(set(vocab.tokens)) != n_vocab:  # libllama ends the process on this, so it must not pass
        seen: set[str] = set()
        twice = next(t for t in vocab.tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise ConvertError(
            f"expected each token once, got {twice!r} twice in the tokenizer; fetch the checkpoint again"
        )


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json or tokenizer_config.json, in transformers' order."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_text(path)
        except (OSError, UnicodeDecodeError) as err:
            raise ConvertError(f"cannot read {path} as UTF-8 text; fetch the checkpoint again") from err
    for source in (_optional(folder / "chat_template.json"), config, _optional(folder / "processor_config.json")):
        template = source.get("chat_template")
        if isinstance(template, list):  # [{"name": "default", "template": ...}, ...]
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default") or next(iter(named.values()), None)
        if isinstance(template, str) and template:
            return template
    return None


def _special(
    vocab: Vocabulary, config: dict[str, Any], older: dict[str, Any], generation: dict[str, Any], text: TextSpec
) -> None:
    """Finds bos, eos, unk and pad by their text, else by the ids of generation_config.json and config.json.

    Then the end of turn.
    """
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    for kind in ("bos", "eos", "unk", "pad"):
        entry = config.get(f"{kind}_token") or older.get(f"{kind}_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        numbers = [generation.get(f"{kind}_token_id"), text.token_ids.get(kind)]
        if isinstance(content, str) and content in ids:
            vocab.special[kind] = ids[content]
            continue
        for number in numbers:
            first = number[0] if isinstance(number, list) and number else number
            if isinstance(first, int) and 0 <= first < len(vocab.tokens):
                vocab.special[kind] = first
                break
    if "unk" not in vocab.special and vocab.unknown is not None:
        vocab.special["unk"] = vocab.unknown
    if "eos" not in vocab.special:
        raise ConvertError(
            "expected an eos_token in tokenizer_config.json or an eos_token_id in config.json, found neither; add one"
        )
    ends = generation.get("eos_token_id")
    listed = {end for end in ends if isinstance(end, int)} if isinstance(ends, list) else set()
    template = vocab.chat_template or ""
    for content in _END_OF_TURN:
        if (
            content in ids
            and vocab.types[ids[content]] in (CONTROL, USER_DEFINED)
            and (content in template or ids[content] in listed)
        ):
            vocab.special["eot"] = ids[content]
            return


def _begin_and_end(vocab: Vocabulary, data: dict[str, Any], config: dict[str, Any]) -> None:
    """Whether a text starts with bos and ends with eos."""
    begin, end = _post_processor(data.get("post_processor"), vocab)
    if not data:  # transformers' LlamaTokenizer, built from tokenizer.model
        begin, end = True, False
    vocab.add_bos = bool(begin if config.get("add_bos_token") is None else config["add_bos_token"])
    vocab.add_eos = bool(end if config.get("add_eos_token") is None else config["add_eos_token"])
    if vocab.add_bos and "bos" not in vocab.special:  # libllama would end the process
        raise ConvertError(
            "expected a bos_token, because the tokenizer puts one in front, found none; "
            "name it in tokenizer_config.json"
        )


def _post_processor(post: Any, vocab: Vocabulary) -> tuple[bool, bool]:
    """(bos in front, eos after) by a TemplateProcessing post-processor, alone or inside a Sequence."""
    if not isinstance(post, dict):
        return False, False
    if post.get("type") == "Sequence":
        found = [_post_processor(part, vocab) for part in post.get("processors", [])]
        return any(b for b, _ in found), any(e for _, e in found)
    if post.get("type") != "TemplateProcessing":
        return False, False
    template = post.get("single") or []
    text = next((i for i, part in enumerate(template) if "Sequence" in part), 0)
    before, after = (
        [p["SpecialToken"]["id"] for p in part if "SpecialToken" in p]
        for part in (template[:text], template[text + 1 :])
    )
    names = {kind: vocab.tokens[token] for kind, token in vocab.special.items()}
    for given, allowed in ((before, names.get("bos")), (after, names.get("eos"))):
        if given and given != [allowed]:
            raise ConvertError(
                f"expected a post_processor that adds bos and eos only, got {json.dumps(given, ensure_ascii=False)} "
                "in tokenizer.json; "
                f"llama.cpp knows no other"
            )
    return bool(before), bool(after)
