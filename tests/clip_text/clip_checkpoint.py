"""Tiny random CLIPs with a tokenizer of CLIP's kind, saved as transformers saves them and as OpenAI's files are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
N_HIDDEN = 32  # of the vision tower; that of the LLaVA that tests/conftest.py makes

#: What CLIP's pattern, its normalizer and its special tokens treat in their own way.
EXTRA = [
    "a photo of a cat", "A Photo Of A CAT.", "don't WE'VE It'D they'll I'M he's", "''s 'S '", "!'s",
    "1234 x12y \xbd \xb2", "wow!!!??", "a<b>c|d", "<|endoftext|>", "x <|endoftext|> y", "<|startoftext|>a",
    "A<|ENDOFTEXT|>!!!", "<|EndOfText|>'s", "<|endoftext", "  many \t\n spaces\xa0here\u3000too ",
    "STRASSE Stra\xdfe \u1e9e",
    "\u03a3\u038a\u03a3\u03a5\u03a6\u039f\u03a3 \u039f\u03b4\u03c5\u03c3\u03c3\u03ad\u03b1\u03c2 \u0386\u0388\u0389",
    "\u041c\u041e\u0421\u041a\u0412\u0410 \u0401\u0436\u0438\u043a \u0407\u0436\u0430\u043a", "\u0130stanbul \u0131",
    "\xc0\xc9\xce\xd5\xdc \u01c4 \u01c5 \u0178 \u013f", "cafe\u0301 E\u0302\u0323 e\u0323\u0302",
    "\u1112\u1161\u11ab\u1100\u1173\u11af \ud55c\uae00", "\u212b \u2126 \u212a \u2ade\u0338", "\u0958 \u0928\u093c",
    "\uf900 \U0002f800", "\ufb01 \u0149 \u01f0", "\u0344 \u0345\u0301", "\u2167 \u2177 \u24b6",
    "\U0001d400 \U00010400 \U0001e900", "\u65e5\u672c\u8a9e \u30c6\u30ad\u30b9\u30c8",
    "\u0e44\u0e17\u0e22 \u0e2b\u0e19\u0e36\u0e48\u0e07", "\u200d \u200b \ufeff", "\x00\x01 \x7f",
    "\U0001f436\U0001f431 \U0001f680", "_under_score- --", "What color is it?", "?", "", " ", "'", "9", "a" * 300,
    "ab " * 300,
    "\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301",
    "\xe9" * 200, "!" * 300,
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One CLIP: text tower's width and so on, how its tokenizer is stored, and which end token its config names."""

    activation: str
    n_embd: int
    n_head: int
    n_layer: int
    n_ff: int
    n_ctx: int
    n_proj: int
    old_files: bool  # vocab.json and merges.txt, special tokens at the end, eos_token_id 2


CASES = {
    "quick_gelu": Case("quick_gelu", 48, 3, 3, 80, 20, 24, True),
    "gelu": Case("gelu", 64, 4, 2, 112, 512, 40, False),
}


def train(texts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a small byte-level BPE with </w>."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tok = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    tok.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tok.train_from_iterator([text for text in texts if text.isprintable()] * 2, trainer)
    model = json.loads(tok.to_str())["model"]
    return list(model["vocab"]), [(left, right) for left, right in model["merges"]]


def write_tokenizer(folder: Path, texts: list[str], case: Case) -> int:
    """Saves the tokenizer; returns how many tokens it has."""
    import transformers

    tokens, merges = train(texts)
    if not case.old_files:  # some letters lack their </w>: they become the unknown token
        ids = {token: i for i, token in enumerate([BEGIN, END, *tokens])}
        tok = transformers.CLIPTokenizer(vocab=ids, merges=merges, model_max_length=case.n_ctx)
        tok.save_pretrained(folder)
        return len(ids)
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*letters, *(letter + "</w>" for letter in letters)]
    known += [token for token in tokens if token not in set(known)]
    ids = {token: i for i, token in enumerate([*known, BEGIN, END])}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"model_max_length": case.n_ctx, "bos_token": BEGIN, "eos_token": {"__type": "AddedToken", "content": END}}
        )
    )
    return len(ids)


def make_clip(folder: Path, texts: list[str], case: Case) -> Path:
    """A random CLIPModel of fixed seed in `folder`."""
    import torch
    import transformers

    folder.mkdir()
    n_vocab = write_tokenizer(folder, texts, case)
    end = 2 if case.old_files else 1
    text = {
        "vocab_size": n_vocab + 3, "hidden_size": case.n_embd, "intermediate_size": case.n_ff,
        "num_hidden_layers": case.n_layer, "num_attention_heads": case.n_head,
        "max_position_embeddings": case.n_ctx, "hidden_act": case.activation, "projection_dim": case.n_proj,
        "bos_token_id": 0, "eos_token_id": end, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": N_HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7, "projection_dim": case.n_proj,
    }  # fmt: skip
    torch.manual_seed(2506)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=case.n_proj)
    )
    with torch.no_grad():
        for weight in model.parameters():  # attention that is far from uniform, norms that are not one
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif weight.dim() == 2:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def nmse(got: Array, want: Array) -> float:
    return float(((got.astype("f8") - want) ** 2).sum() / (want.astype("f8") ** 2).sum())


def hidden_states(n_tok: int = 50, seed: int = 7) -> npt.NDArray[np.float32]:
    """Rows of different size and spread, as a tower's are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_tok, N_HIDDEN)) * rng.uniform(0.1, 8, (n_tok, 1)) + rng.standard_normal(N_HIDDEN)
    return x.astype("f4")
