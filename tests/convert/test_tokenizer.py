"""Token ids: libllama on the converted vocabulary against transformers (or tokenizers) on the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qap_gguf.convert.llava.language import metadata
from qap_gguf.convert.llava.spec import parse
from qap_gguf.convert.output.writer import write_gguf
from qap_gguf.convert.source.checkpoint import read_json
from qap_gguf.convert.tokenizers import bpe, spm
from qap_gguf.convert.tokenizers import load as tokenizer
from qap_gguf.errors import ConvertError

llama_cpp = pytest.importorskip("llama_cpp")
tokenizers = pytest.importorskip("tokenizers")


class Libllama:
    """A vocabulary written as a GGUF file without tensors and read by libllama."""

    def __init__(self, folder: Path, n_vocab: int, out: Path) -> None:
        text = {"vocab_size": n_vocab, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
        spec = parse({"model_type": "llava", "text_config": text}).text
        self.vocab = tokenizer.load(folder, spec)
        path = out / "vocab.gguf"
        write_gguf(path, "llama", metadata(spec, self.vocab, "vocab", 0), [], print)
        self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        out: list[int] = self.model.tokenize(text.encode(), add_bos=True, special=special)
        return out


def differing(ours: Libllama, theirs: Any, texts: list[str]) -> list[tuple[str, list[int], list[int]]]:
    rows = [(t, ours.ids(t), list(theirs(t))) for t in texts if t]  # libllama gives [] for "" by itself
    return [row for row in rows if row[1] != row[2]]


SPECIALS = [
    "<|im_start|>user\nHi<|im_end|>\n",
    "a<|im_end|> b",
    "<|endoftext|><|endoftext|>",
    "x<box>y <box> z",
    "<|im_start",
    "<box",
]


def test_smollm2_ids_equal_transformers(tiny_llava: Path, tmp_path: Path, texts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Libllama(tiny_llava, 49152, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_llava)
    assert len(texts) >= 200
    assert not differing(ours, lambda t: theirs(t).input_ids, texts + SPECIALS)
    # This copy of SmolLM2's tokenizer was saved without its step for digits, so it is GPT-2's by structure.
    assert ours.vocab.pre == "gpt-2"
    assert ours.vocab.special == {"bos": 1, "eos": 2, "eot": 2, "unk": 0, "pad": 2}
    assert ours.model.token_eos() == 2


def steps(name: str) -> tuple[Any, bool]:
    """The pre-tokenizer that `bpe` calls `name`, rebuilt from its table, and ignore_merges."""
    pre = tokenizers.pre_tokenizers
    build = {
        "bytes": lambda: pre.ByteLevel(add_prefix_space=False, use_regex=False),
        "bytes+words": lambda: pre.ByteLevel(add_prefix_space=False),
        "digits": lambda: pre.Digits(individual_digits=True),
    }
    (key, ignore) = next(k for k, v in bpe.PRE_TOKENIZERS.items() if v == name)
    parts = [
        build[s]()
        if s in build
        else pre.Split(tokenizers.Regex(s.removeprefix("split ")), behavior="isolated", invert=False)
        for s in key
    ]
    return (parts[0] if len(parts) == 1 else pre.Sequence(parts)), ignore


@pytest.mark.parametrize("name", [name for name in bpe.PRE_TOKENIZERS.values() if name not in bpe.DIFFERENCES])
def test_each_pre_tokenizer_equals_its_namesake(name: str, bpe_folder: Any, tmp_path: Path, texts: list[str]) -> None:
    pre, ignore = steps(name)
    folder = bpe_folder(pre, ignore_merges=ignore)
    ours = Libllama(folder, 700, tmp_path)
    assert ours.vocab.pre == name
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert not differing(ours, lambda t: theirs.encode(t).ids, texts + SPECIALS)


def test_digits_are_seen_in_the_structure(bpe_folder: Any, tmp_path: Path) -> None:
    """The two names differ on numbers, so a wrong name would be seen."""
    a = Libllama(bpe_folder(steps("gpt-2")[0]), 700, tmp_path)
    folder = bpe_folder(steps("smollm")[0])
    b = Libllama(folder, 700, tmp_path)
    assert (a.vocab.pre, b.vocab.pre) == ("gpt-2", "smollm")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(theirs.encode("1234567").ids) == 7


@pytest.mark.parametrize(
    ("pre", "kwargs"),
    [
        (tokenizers.pre_tokenizers.Whitespace(), {}),
        (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), {"ignore_merges": True}),
        (
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            {"normalizer": tokenizers.normalizers.Lowercase()},
        ),
    ],
)
def test_unknown_structures_are_refused(pre: Any, kwargs: dict[str, Any], bpe_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"llama\.cpp") as caught:
        Libllama(bpe_folder(pre, **kwargs), 700, tmp_path)
    assert "\n" not in str(caught.value)


def test_bos_comes_from_the_post_processor_or_the_config(bpe_folder: Any, tmp_path: Path) -> None:
    folder = bpe_folder(steps("gpt-2")[0])
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    data = read_json(path)
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    data["post_processor"] = {"type": "TemplateProcessing", "single": [start, {"Sequence": {"id": "A", "type_id": 0}}]}
    path.write_text(json.dumps(data))
    assert Libllama(folder, 700, tmp_path).ids("Hi")[0] == 1
    settings = read_json(config)
    config.write_text(json.dumps(settings | {"add_bos_token": False, "add_eos_token": True}))
    ours = Libllama(folder, 700, tmp_path)
    assert (ours.vocab.add_bos, ours.vocab.add_eos) == (False, True)
    start["SpecialToken"]["id"] = "<|im_end|>"
    path.write_text(json.dumps(data))
    with pytest.raises(ConvertError, match="bos and eos only"):
        Libllama(folder, 700, tmp_path)


def test_special_tokens_and_templates_from_older_files(bpe_folder: Any, tmp_path: Path) -> None:
    folder = bpe_folder(steps("gpt-2")[0])
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D <|im_end|>"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|im_end|>"}}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    vocab = Libllama(folder, 700, tmp_path).vocab
    assert vocab.chat_template == "D <|im_end|>"
    assert vocab.special == {"bos": 1, "eos": 0, "pad": 2, "eot": 2}  # bos: LlamaConfig's default
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert Libllama(folder, 700, tmp_path).vocab.chat_template == "J"
    (folder / "chat_template.jinja").write_text("X")
    assert Libllama(folder, 700, tmp_path).vocab.chat_template == "X"


def test_a_token_twice_is_refused_before_libllama_aborts(bpe_folder: Any, tmp_path: Path) -> None:
    folder = bpe_folder(steps("gpt-2")[0])
    data = read_json(folder / "tokenizer.json")
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 650})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConvertError, match="'<box>' twice"):
        Libllama(folder, 700, tmp_path)


def test_more_tokens_than_embeddings_are_refused(bpe_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"ids 0\.\.599"):
        Libllama(bpe_folder(steps("gpt-2")[0]), 600, tmp_path)


# --- sentencepiece ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A tokenizer.model as Llama's was made: BPE, identity normalizer, byte fallback, digits apart."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    corpus = [line for text in texts * 3 for line in text.replace("\x00", "").splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=900, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.98, minloglevel=2, add_dummy_prefix=True,
    )  # fmt: skip
    return folder / "tokenizer.model"


def spm_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "added_tokens_decoder": {"900": {"content": "<image>", "special": True}},
            }
        )
    )


def hf_json(model: Path, folder: Path, *, legacy: bool = True) -> Path:
    """The tokenizer.json that transformers' conversion makes of a tokenizer.model: complete merges, spaces replaced."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces:
        local = [
            (piece[:i], piece[i:], score) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab
        ]
        merges += sorted(local, key=lambda m: (vocab[m[0]], vocab[m[1]]))
    merges.sort(key=lambda m: m[2], reverse=True)
    tok = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [m[:2] for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    norm, added = tokenizers.normalizers, tokenizers.AddedToken
    if legacy:
        tok.normalizer = norm.Sequence([norm.Prepend("\u2581"), norm.Replace(" ", "\u2581")])
    else:
        tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            replacement="\u2581", prepend_scheme="always", split=False
        )
    tok.add_special_tokens([added(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>", "<image>")])
    tok.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = folder / "tokenizer.json"
    tok.save(str(path))
    return path


SPM_SPECIALS = ["<s>Hi</s>", "USER: <image>\nWhat?", "a</s><s>b", "<imag"]


def test_sentencepiece_model_is_read_like_its_own_library(llama_model: Path) -> None:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(llama_model))
    vocab = spm.from_model(llama_model)
    assert vocab.tokens == [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    assert vocab.scores == [sp.get_score(i) for i in range(sp.get_piece_size())]
    assert (vocab.types[:3], vocab.types.count(6), vocab.unknown) == ([2, 3, 3], 256, 0)


def test_sentencepiece_model_alone(llama_model: Path, tmp_path: Path, texts: list[str]) -> None:
    """Only tokenizer.model: ids as sentencepiece gives them, bos in front."""
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(llama_model.read_bytes())
    spm_config(tmp_path)
    ours = Libllama(tmp_path, 904, tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(llama_model))
    assert not differing(ours, lambda t: [1, *sp.encode(t)], [t for t in texts if "\x00" not in t])
    assert ours.vocab.tokens[900:902] == ["<image>", "[PAD901]"]
    assert ours.ids("<image>") == [1, 900]


@pytest.mark.parametrize("with_model", [False, True])
def test_llama_tokenizer_json(llama_model: Path, tmp_path: Path, texts: list[str], with_model: bool) -> None:
    """tokenizer.json alone (scores from merges) and beside tokenizer.model (its scores)."""
    path = hf_json(llama_model, tmp_path)
    spm_config(tmp_path)
    if with_model:
        (tmp_path / "tokenizer.model").write_bytes(llama_model.read_bytes())
    ours = Libllama(tmp_path, 904, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert not differing(ours, lambda t: theirs.encode(t).ids, texts + SPM_SPECIALS)
    assert (ours.vocab.model, ours.vocab.add_bos, ours.vocab.add_eos, ours.vocab.add_space_prefix) == (
        "llama",
        True,
        False,
        True,
    )
    assert ours.vocab.special == {"bos": 1, "eos": 2, "unk": 0}


def test_metaspace_tokenizer_json(llama_model: Path, tmp_path: Path, texts: list[str]) -> None:
    """The same with a Metaspace.

    It puts no second space before a text that starts with one, sentencepiece and llama.cpp do.
    """
    path = hf_json(llama_model, tmp_path, legacy=False)
    spm_config(tmp_path)
    ours = Libllama(tmp_path, 904, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert not differing(ours, lambda t: theirs.encode(t).ids, [t for t in texts if not t.startswith(" ")])


def test_incomplete_merges_are_refused(llama_model: Path, tmp_path: Path) -> None:
    path = hf_json(llama_model, tmp_path)
    spm_config(tmp_path)
    data = read_json(path)
    kept = [m for i, m in enumerate(data["model"]["merges"]) if i != 5]
    path.write_text(json.dumps(data | {"model": data["model"] | {"merges": kept}}))
    with pytest.raises(ConvertError, match="expected a merge of"):
        Libllama(tmp_path, 904, tmp_path)


def test_scattered_merges_are_refused(llama_model: Path, tmp_path: Path) -> None:
    """A token's two merges with others between them: one score cannot say that."""
    path = hf_json(llama_model, tmp_path)
    spm_config(tmp_path)
    data = read_json(path)
    merges = data["model"]["merges"]
    at = next(i for i in range(len(merges) - 1) if "".join(merges[i]) == "".join(merges[i + 1]))
    moved = [*merges[:at], *merges[at + 1 :], merges[at]]
    path.write_text(json.dumps(data | {"model": data["model"] | {"merges": moved}}))
    with pytest.raises(ConvertError, match="side by side"):
        Libllama(tmp_path, 904, tmp_path)


def test_files_of_two_tokenizers_are_refused(llama_model: Path, tmp_path: Path) -> None:
    path = hf_json(llama_model, tmp_path)
    spm_config(tmp_path)
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    vocab = data["model"]["vocab"]
    vocab["\u2581"], vocab["e"] = vocab["e"], vocab["\u2581"]
    path.write_text(json.dumps(data))
    (tmp_path / "tokenizer.model").write_bytes(llama_model.read_bytes())
    with pytest.raises(ConvertError, match="same token"):
        Libllama(tmp_path, 904, tmp_path)


@pytest.mark.parametrize("damage", [b"", b"hello, this is no model", b"\x0a\xff\xff\xff\x7f", b"\xff" * 40])
def test_broken_sentencepiece_models_are_refused(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage)
    with pytest.raises(ConvertError) as caught:
        spm.from_model(path)
    assert "\n" not in str(caught.value)


def test_unigram_models_are_refused(tmp_path: Path, texts: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in texts * 3 for line in text.replace("\x00", "").splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), vocab_size=450, model_type="unigram",
        byte_fallback=True, minloglevel=2, character_coverage=0.98,
    )  # fmt: skip
    with pytest.raises(ConvertError, match="model_type 1"):
        spm.from_model(tmp_path / "tokenizer.model")
