"""Ids of 600 texts: libllama on our vocabulary against transformers, for each kind of tokenizer that a LLaVA has.

The texts are code, prose, CJK, emoji, runs of spaces, and special tokens in the middle of all that; they are NFC, for
llama.cpp has no normalizer (Qwen2's has NFC).
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import PIECES, strings, train_bpe, write_bpe
from convert.test_tokenizer import Libllama, differing, hf_json, spm_config, steps
from qap_gguf.convert import convert
from qap_gguf.convert.source.checkpoint import read_json
from qap_gguf.convert.tokenizers import bpe
from qap_gguf.files.gguf import read_gguf

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.parity

COUNT = 600
CODE = [
    "def forward(self, x: torch.Tensor) -> torch.Tensor:\n\treturn self.linear_1(x)\n", "#include <vector>\r\n",
    "if (a != b && c <= d) { return a->b[0x1F]; } // done", "SELECT id, name FROM t WHERE id >= 10 ORDER BY 2 DESC;",
    "<html>\n  <body class='x'>&nbsp;</body>\n</html>", "{\"key\": [1, 2.5e-3, null, true]}",
    "x = {**y, 'z': lambda q: q}", "git commit -m \"fix: #123\"", "$HOME/.cache/*.gguf",
    "\\begin{equation} E=mc^2 \\end{equation}", "~~~~~~~~", "_" * 9,
]  # fmt: skip
BLOCKS = {  # first and last code point of letters that Unicode has had for long
    "CJK": (0x4E00, 0x9FA5), "Hangul": (0xAC00, 0xD7A3), "Cyrillic": (0x410, 0x44F), "Greek": (0x3B1, 0x3C9),
    "Arabic": (0x627, 0x63A), "Hebrew": (0x5D0, 0x5EA), "Kana": (0x3041, 0x3093), "emoji": (0x1F300, 0x1F5FF),
    "faces": (0x1F600, 0x1F64F), "Latin": (0xC0, 0xD6), "symbols": (0x2190, 0x21FF), "boxes": (0x2500, 0x257F),
}  # fmt: skip


def many_texts(specials: list[str]) -> list[str]:
    """`COUNT` texts from one generator of fixed seed."""
    rng = random.Random(20265)
    pieces = [*PIECES, *CODE]

    def word() -> str:
        first, last = rng.choice(list(BLOCKS.values()))
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))

    def part() -> str:
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(pieces)
        if kind < 0.8:
            return word()
        if kind < 0.9:
            return rng.choice(specials)
        return rng.choice([" " * rng.randint(1, 12), "\n" * rng.randint(1, 4), "\t", str(rng.randint(0, 10**9))])

    found: dict[str, None] = {}
    while len(found) < COUNT:
        glue = rng.choice(["", " ", "\n", ", "])
        found[unicodedata.normalize("NFC", glue.join(part() for _ in range(rng.randint(1, 7))))] = None
    return list(found)


def bpe_kind(name: str, tokenizer_class: str, normalizer: Any = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pre, ignore = steps(name)
        write_bpe(folder, train_bpe(pre, ignore_merges=ignore, normalizer=normalizer))
        change_config(folder, tokenizer_class=tokenizer_class)

    return make


def spm_kind(*control: str) -> Callable[[Path], None]:
    """Llama's sentencepiece model of 900 tokens, with control tokens as Mistral's third version has them."""

    def make(folder: Path) -> None:
        texts = (strings() + CODE) * 3
        corpus = [line for text in texts for line in text.replace("\x00", "").splitlines() if line.strip()]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=900, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
            allow_whitespace_only_pieces=True, character_coverage=0.98, minloglevel=2, control_symbols=list(control),
        )  # fmt: skip
        path = hf_json(folder / "tokenizer.model", folder)
        data = read_json(path)
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        data["added_tokens"] += [{"id": data["model"]["vocab"][text], "content": text} | special for text in control]
        path.write_text(json.dumps(data))
        spm_config(folder)
        change_config(folder, tokenizer_class="PreTrainedTokenizerFast")

    return make


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | values))


CHAT = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<box>"]
LLAMA = ["<s>", "</s>", "<image>"]
MISTRAL = ["[INST]", "[/INST]"]
KINDS: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "gpt-2": (bpe_kind("gpt-2", "PreTrainedTokenizerFast"), "gpt-2", CHAT),
    "smollm": (bpe_kind("smollm", "PreTrainedTokenizerFast"), "smollm", CHAT),
    "llama 3": (bpe_kind("llama-bpe", "PreTrainedTokenizerFast"), "llama-bpe", CHAT),
    "qwen2": (bpe_kind("qwen2", "Qwen2Tokenizer", tokenizers.normalizers.NFC()), "qwen2", CHAT),
    "llama, mistral 1": (spm_kind(), "default", LLAMA),
    "mistral 3": (spm_kind(*MISTRAL), "default", LLAMA + MISTRAL),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_ids_equal_transformers(kind: str, tmp_path: Path) -> None:
    make, pre, specials = KINDS[kind]
    make(tmp_path)
    texts = many_texts(specials)
    assert len(set(texts)) == COUNT
    ours, theirs = Libllama(tmp_path, 1000, tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab.pre == pre
    wrong = differing(ours, lambda text: theirs(text).input_ids, texts)
    print(f"{kind}: {COUNT - len(wrong)} of {COUNT} texts have equal ids")
    assert not wrong
    used = {token for text in texts for token in ours.ids(text)}
    assert set(theirs.convert_tokens_to_ids(specials)) <= used


# --- tekken: equal but for what bpe.DIFFERENCES says ---

HINDI, THAI = "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"
TEKKEN = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{n}>" for n in range(5, 20))]
SPLIT = [HINDI, THAI, "F\u00dcR", "\u00c9COLE", "GR\u00d6SSE"]
SAME = [
    "F\u00fcr", "\u00c9cole", "caf\u00e9", "CAF\u00c9", "\u042d\u0422\u041e", "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1",
    "HTTPServer", "camelCase", "WE'VE", "\u4f7f\u7528GPU", "\u65e5\u672cABCabc", "\u0645\u0631\u062d\u0628\u0627",
    "a/b\n/c",
]  # fmt: skip


def split_otherwise(text: str) -> bool:
    """As the note says: a mark, or a capital after the first letter of a word with cased letters outside ASCII."""
    kinds = [unicodedata.category(letter) for letter in text]
    if any(kind.startswith("M") for kind in kinds):
        return True
    for is_word, run in itertools.groupby(range(len(text)), key=lambda i: kinds[i].startswith("L")):
        word = list(run)
        cased = [i for i in word if kinds[i] in ("Lu", "Lt", "Ll")]
        capital = any(kinds[i] != "Ll" for i in cased if i > word[0])
        if is_word and capital and any(not text[i].isascii() for i in cased):
            return True
    return False


def tekken(folder: Path, size: int, corpus: list[str]) -> None:
    """A tokenizer.json as Mistral NeMo's: special tokens first, bos in front of a text, whole words before merges."""
    pre, ignore = steps("tekken")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore))
    tok.pre_tokenizer, tok.decoder = pre, tokenizers.decoders.ByteLevel()
    tok.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": TEKKEN, "initial_alphabet": alphabet, "show_progress": False}
    tok.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(vocab_size=size, **options))
    write_bpe(folder, tok)
    change_config(folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("size", [700, 4000])
def test_tekken_differs_where_its_note_says_and_nowhere_else(size: int, tmp_path: Path) -> None:
    texts = many_texts(["[INST]", "[/INST]"])
    own = [*SPLIT, *SAME]
    tekken(tmp_path, size, (strings() + own * 20) * 3 + (texts if size > 1000 else []))
    ours, theirs = Libllama(tmp_path, size, tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.vocab.pre, ours.vocab.add_bos) == ("tekken", True)
    assert [text for text in own if split_otherwise(text)] == [*SPLIT, "CAF\u00c9", "\u042d\u0422\u041e"]
    for lead in ("", "a ", "(", "\n"):
        wrong = [row[0] for row in differing(ours, lambda t: theirs(t).input_ids, [lead + text for text in own])]
        assert wrong == [lead + text for text in SPLIT]
    wrong = [row[0] for row in differing(ours, lambda text: theirs(text).input_ids, texts)]
    named = [text for text in texts if split_otherwise(text)]
    with_words = [text for text in texts if HINDI in text or THAI in text]
    unmarked = len(set(wrong) - set(with_words))
    print(f"tekken, {size} tokens: {len(wrong)} of {COUNT} texts differ, {unmarked} unmarked; {len(named)} are named")
    assert set(wrong) <= set(named)
    assert [text for text in wrong if text in with_words] == with_words
    assert COUNT - len(named) > 400  # so many that have to be equal
    used = {token for text in texts for token in ours.ids(text)}
    assert {ours.ids("[INST]")[1], ours.ids("[/INST]")[1]} == {3, 4}
    assert {1, 3, 4} <= used


def test_a_llava_with_tekken_is_converted_and_noted(plain_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain_llava, tmp_path / "ckpt"))
    tekken(folder, 640, strings() * 3)
    made = convert(folder, tmp_path / "out", quantize="F16")
    assert read_gguf(made.model).metadata["tokenizer.ggml.pre"] == "tekken"
    assert bpe.DIFFERENCES["tekken"] in made.notes
    assert not any("\n" in note for note in made.notes)
