"""Checkpoints for the conversion tests: tiny random LLaVAs made with transformers, and the packaged tiny-llava.

`plain_model` is the packaged language model before it was relabelled.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A shell that starts tests in the background has them ignore Ctrl-C, and so would all children: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A little of everything that tokenizers treat differently.
PIECES = [
    "Hello world", " leading space", "trailing space ", "two  spaces", "   three", "\n", "\n\n", " \n ", "\t\tx",
    "a\r\nb",
    "I'm he's they'll WE'VE It'D", "don't", "1", "12", "123", "1234567", "3.14", "x1y22z333", "2024-01-31", "$5.00!",
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < 10; ++i) { a[i] += 1; }",
    "SELECT * FROM t WHERE a != 'b';", "<div class=\"a\">",
    "https://example/a?b=c&d=e", "snake_case camelCase PascalCase", "...", "!?", "--", "=== ###", "(a)[b]{c}", "a/b\\c",
    "caf\u00e9 na\u00efve", "Stra\u00dfe", "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f436", "\U0001f436\U0001f431 \U0001f680", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f",
    "\U0001f1e9\U0001f1ea",
    "\u00a0nbsp", "\u200bzero", "\u2003em space", "\u2028", "\x00nul", "\x7f", "\ufeffbom", "a" * 40, " " * 17,
    "ab" * 30, "\u00bd \u2460 \u0664",
]  # fmt: skip


def strings() -> list[str]:
    """About 200 texts: the pieces, neighbours joined in three ways, and long mixtures."""
    out = list(PIECES)
    for glue in ("", " ", "\n"):
        out += [glue.join(pair) for pair in itertools.pairwise(PIECES)]
    return [*out, " ".join(PIECES), "".join(reversed(PIECES)), ""]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return strings()


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model's checkpoint."""
    pytest.importorskip("safetensors")
    import tiny_checkpoint

    if not tiny_checkpoint.TRAINED.is_file():
        pytest.skip(f"no {tiny_checkpoint.TRAINED}; it is in the repository, not in the sdist")
    folder = tmp_path_factory.mktemp("trained") / "tiny-llava"
    tiny_checkpoint.build(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged language model as it was before it was relabelled: what stock libmtmd runs, one position a token."""
    import qap_gguf as qap
    from qap_gguf.convert.relabel import relabel

    packaged = qap.packaged_model().model
    return relabel(packaged, tmp_path_factory.mktemp("plain") / packaged.name, undo=True)


def train_bpe(pre_tokenizer: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> Any:
    """A byte-level BPE of 640 tokens on the test texts, with three special tokens and one that is not special."""
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    tok.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tok.normalizer = normalizer
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(strings() * 3, trainer)
    tok.add_tokens([tokenizers.AddedToken("<box>", special=False, normalized=False)])
    return tok


def write_bpe(
    folder: Path,
    tok: Any,
    template: str | None = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}<|im_end|>",
) -> None:
    tok.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>", "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )


@pytest.fixture
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """bpe_folder(pre_tokenizer, ignore_merges=False, normalizer=None) -> a folder with a byte-level BPE tokenizer."""

    def make(pre_tokenizer: Any, **kwargs: Any) -> Path:
        folder = tmp_path_factory.mktemp("bpe")
        write_bpe(folder, train_bpe(pre_tokenizer, **kwargs))
        return folder

    return make


MakeLlava = Callable[..., Path]


@pytest.fixture(scope="session")
def make_llava(tmp_path_factory: pytest.TempPathFactory) -> MakeLlava:
    """make_llava(text={}, vision={}, top={}, dtype="float32", save={}, siglip=False, language="Llama") -> a folder.

    It holds a random LLaVA of fixed seed. language: "Llama", "Mistral" or "Qwen2", as transformers names its classes;
    kind: "Llava" or "LlavaNext".
    GQA, a head dimension that is not hidden / heads, an embedding with more rows than the tokenizer has tokens.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")

    def make(
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        top: dict[str, Any] | None = None,
        dtype: str = "float32",
        save: dict[str, Any] | None = None,
        siglip: bool = False,
        language: str = "Llama",
        kind: str = "Llava",
    ) -> Path:
        import tokenizers

        folder = tmp_path_factory.mktemp("llava") / "ckpt"
        llama = {
            "vocab_size": 656, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.2,
        }  # fmt: skip
        tower: dict[str, Any] = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 7,
        }  # fmt: skip
        vision_class = transformers.SiglipVisionConfig if siglip else transformers.CLIPVisionConfig
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision_class(**(tower | (vision or {}))),
            text_config=getattr(transformers, f"{language}Config")(**(llama | (text or {}))),
            **(
                {"image_token_index": 3, "vision_feature_select_strategy": "full" if siglip else "default"}
                | (top or {})
            ),
        )
        torch.manual_seed(20265)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:  # norms and biases of one and nothing would hide a mix-up
                    weight.add_(torch.randn_like(weight) * 0.1)
                elif "position_embedding" in name:
                    weight.normal_(0, 0.3)
        model.to(getattr(torch, dtype)).save_pretrained(folder, **(save or {}))
        processor = {
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        write_bpe(folder, train_bpe(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)))
        return folder

    return make


@pytest.fixture(scope="session")
def plain_llava(make_llava: MakeLlava) -> Path:
    """One float32 checkpoint for all tests that only read it."""
    return make_llava()


Converted = Callable[[str], tuple[Any, Path, Any]]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """converted(family) -> transformers' model of a random checkpoint, its folder, and the two files in f32.

    The families are those of families.checkpoints, and "llava-next". Each is converted once for all processes of a
    session, since that takes seconds: nobody may write into these folders.
    """
    import qap_gguf as qap

    made: dict[str, tuple[Any, Path, Any]] = {}
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "converted"
    root.mkdir(exist_ok=True)

    def make(name: str) -> tuple[Any, Path, Any]:
        if name not in made:
            from families.checkpoints import FAMILIES, llavanext

            write = llavanext if name == "llava-next" else FAMILIES[name].make
            folder, done = root / name, root / f"{name}.pickle"
            source, options = folder / "ckpt", dict[str, Any](quantize="F32", mmproj_type="f32", keep_positions=False)
            with open(root / f"{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
                if done.is_file():  # by another process, from the same weights: their seed is fixed
                    again = tmp_path_factory.mktemp(name) / "ckpt"
                    made[name] = (write(again), source, pickle.loads(done.read_bytes()))
                else:
                    shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                    hf, files = write(source), qap.convert(source, folder / "gguf", name="model", **options)
                    done.write_bytes(pickle.dumps(files))
                    made[name] = (hf, source, files)
        return made[name]

    return make
