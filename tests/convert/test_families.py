"""Models that llama.cpp's own converter knows: what it makes, what we add, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import qap_gguf as qap
from conftest import train_bpe, write_bpe
from convert.test_errors import edit_tensors, poison
from convert.test_imatrix import write_gguf as write_imatrix
from convert.test_language import IDS, fields, logits, nmse
from convert.test_tokenizer import steps
from qap_gguf import _core
from qap_gguf.convert import ConvertResult, convert
from qap_gguf.convert.output.writer import write_gguf
from qap_gguf.convert.tokenizers import bpe
from qap_gguf.convert.upstream import families
from qap_gguf.convert.upstream import run as upstream
from qap_gguf.errors import ConvertError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

TEXT: dict[str, Any] = {
    "vocab_size": 656, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
MEAN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def save(model: Any, folder: Path, processor: dict[str, Any], tokenizer: str = "gpt-2") -> Path:
    model.save_pretrained(folder)
    pre, ignore = steps(tokenizer)
    tok = train_bpe(pre, ignore_merges=ignore)
    tok.add_special_tokens(["[IMG_BREAK]"])
    write_bpe(folder, tok)
    (folder / "preprocessor_config.json").write_text(json.dumps(MEAN | processor))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 4, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    torch.manual_seed(3)
    config = transformers.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision)
    size = {"min_pixels": 256, "max_pixels": 65536, "merge_size": 2, "patch_size": 8, "temporal_patch_size": 2}
    return save(transformers.Qwen2VLForConditionalGeneration(config), tmp_path_factory.mktemp("qwen") / "ckpt", size)


@pytest.fixture(scope="module")
def pixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Pixtral: its class is LLaVA's, and only its tower says that it is none of ours."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
             "image_size": 64, "patch_size": 8, "head_dim": 16}  # fmt: skip
    torch.manual_seed(4)
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**tower), text_config=transformers.MistralConfig(**TEXT),
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_token_index=3,
    )  # fmt: skip
    size = {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}}
    folder = tmp_path_factory.mktemp("pixtral") / "ckpt"
    return save(transformers.LlavaForConditionalGeneration(config), folder, size, "tekken")


@pytest.mark.parity
def test_the_language_model_equals_transformers(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, str]] = []
    result = convert(qwen, tmp_path, quantize="F32", mmproj_type="f32", name="q", progress=lambda *s: seen.append(s))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mmproj-f32.gguf", "q-F32.gguf"]
    done = [step[0] for step in seen]
    assert done == sorted(set(done))
    assert done[-1] == seen[-1][1]
    hf = transformers.Qwen2VLForConditionalGeneration.from_pretrained(qwen, dtype=torch.float32).eval()
    with torch.no_grad():
        want = hf(input_ids=torch.tensor([IDS])).logits[0].numpy()
    error = nmse(logits(result.model, IDS), want)
    print(f"Qwen2-VL text logits NMSE {error:.1e}")
    assert error <= 1e-5
    # The tokenizer was trained here: its hash is unknown to the converter, its structure is not to us.
    assert fields(result.model)["tokenizer.ggml.pre"] == "gpt-2"
    check_imatrix(qwen, result, tmp_path, monkeypatch)


def test_what_is_ours_is_added_and_code_never_runs(
    pixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name, the pruning defaults, and a type that the converter itself does not write.

    Upstream calls AutoTokenizer with trust_remote_code, so the checkpoint's code must not even be within its reach.
    """
    folder, mark = Path(shutil.copytree(pixtral, tmp_path / "copy")), tmp_path / "exploded"
    (folder / "tokenization_x.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass X(PreTrainedTokenizerFast): pass\n"
    )
    change_json("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_x.X"]})(folder)
    # The file would run as it lies there, with the switch that upstream sets.
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists()
    mark.unlink()
    result = convert(folder, tmp_path / "out", quantize="Q4_0", name="pix", keep_positions=False)
    assert not mark.exists()
    assert (result.mmproj.name, result.model.name) == ("mmproj-f16.gguf", "pix-Q4_0.gguf")
    text = gguf.GGUFReader(result.model)
    assert fields(result.model)["general.name"] == fields(result.mmproj)["general.name"] == "pix"
    assert {t.tensor_type.name for t in text.tensors if t.name.endswith("attn_q.weight")} == {"Q4_0"}
    assert fields(result.model)["general.file_type"] == 2
    assert fields(result.model)["tokenizer.ggml.pre"] == "tekken"
    assert result.notes == (bpe.DIFFERENCES["tekken"],)
    check_prune_keys(folder, result, tmp_path / "again", monkeypatch)


def reuse(made: ConvertResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the converter's next runs give these files."""

    def copy(runs: dict[str, list[str]], *_: object) -> None:
        for run, file in zip(runs.values(), (made.mmproj, made.model), strict=True):
            shutil.copy(file, run[run.index("--outfile") + 1])

    monkeypatch.setattr(families, "run_converter", copy)


def check_imatrix(folder: Path, made: ConvertResult, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reuse(made, monkeypatch)
    for width, words in ((64, None), (65, "65")):
        path = write_imatrix(place / f"{width}.gguf", {"blk.0.ffn_up.weight": np.linspace(0, 1, width)}, [5.0])
        if words is None:
            model = convert(folder, place / "im", quantize="Q4_1", name="x", imatrix=path).model
            assert fields(model)["quantize.imatrix.entries_count"] == 1
        else:
            with pytest.raises(ConvertError, match=words):
                convert(folder, place / "none", quantize="Q4_1", name="x", imatrix=path)


def check_prune_keys(folder: Path, made: ConvertResult, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults are stored where images of this family can be pruned, else refused under the file's final name."""
    reuse(made, monkeypatch)
    prune = qap.PruneConfig(keep_ratio=0.25, alpha=0.75)
    if _core.inspect_mmproj(str(made.mmproj), None)["why_not"] is None:
        result = convert(folder, out, quantize="F16", name="pix", prune=prune)
        assert qap.PruneConfig.from_metadata(fields(result.mmproj)) == prune
    else:
        with pytest.raises(qap.UnsupportedError, match=re.escape(f"got {out}/mmproj-f16.gguf: ")):
            convert(folder, out, quantize="F16", name="pix", prune=prune)
        assert not out.exists()


def test_files_without_tensors_are_refused(pixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter ends well on a checkpoint whose tensors it passes over."""

    def write(runs: dict[str, list[str]], *_: object) -> None:
        for run in runs.values():
            write_gguf(Path(run[run.index("--outfile") + 1]), "clip", {}, [], print)

    monkeypatch.setattr(families, "run_converter", write)
    with pytest.raises(ConvertError, match=r"got a refusal \(expected tensors, found none in the mmproj"):
        convert(pixtral, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def no_encoder(folder: Path) -> None:
    """Only the language model's tensors: the converter then writes an mmproj with next to nothing, and ends well."""

    def change(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "vision_tower" in n or "projector" in n]:
            del tensors[name]

    edit_tensors(change)(folder)


def no_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown architecture": (
        change_json("config.json", architectures=["FooForCausalLM"], model_type="foo", vision_config={}),
        "expected a LLaVA or one of the [0-9]+ architectures .* got 'FooForCausalLM'",
    ),
    "no architecture": (
        change_json("config.json", architectures=None, model_type="foo", vision_config=None),
        "got 'foo'; this model cannot",
    ),
    "no encoder": (no_encoder, "expected two files that llama.cpp loads .* got a refusal .*v.patch_embd.weight"),
    "nan": (poison("layers.1.mlp.up_proj.weight", float("nan")), "NaN or infinity in .*up_proj"),
    "no tensors": (edit_tensors(lambda tensors: tensors.clear()), "expected tensors in"),
    "no shard": (no_shard, "expected the shard"),
    "config of other sizes": (
        change_json("config.json", text_config=TEXT | {"model_type": "mistral", "num_hidden_layers": 1}),
        "expected llama.cpp's converter to read the language model of Llava.*, got a refusal",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_bad_checkpoints_end_in_one_line(pixtral: Path, tmp_path: Path, case: str) -> None:
    change, words = CASES[case]
    folder = Path(shutil.copytree(pixtral, tmp_path / "copy"))
    change(folder)
    with pytest.raises(ConvertError, match=words) as caught:
        convert(folder, tmp_path / "out", quantize="F16", name="t")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_converter_and_leaves_nothing(qwen: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int, what: str) -> None:
        if what == "encoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(qwen, tmp_path / "out", quantize="F16", progress=progress)
    assert not (tmp_path / "out").exists()


def test_the_text_tower_is_for_llava(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="clip_text: expected a LLaVA"):
        convert(qwen, tmp_path / "out", clip_text=qwen)


def test_without_the_extra_it_is_named(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else real(name))
    with pytest.raises(ConvertError, match=r"expected sentencepiece .* pip install torch transformers sentencepiece"):
        convert(qwen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_view_has_no_code_and_no_auto_map(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "x.X"}, "a": 1}))
    (source / "tokenizer.json").write_text("{}")
    (source / "x.py").write_text("1 / 0")
    (source / "folder").mkdir()
    with upstream.view(source) as place:
        assert sorted(path.name for path in place.iterdir()) == ["config.json", "tokenizer.json"]
        assert json.loads((place / "config.json").read_text()) == {"a": 1}
        assert (place / "tokenizer.json").resolve() == source / "tokenizer.json"
    assert not place.exists()


def test_the_converter_is_installed_with_its_licence() -> None:
    folder = upstream.converter_folder()
    assert "MIT License" in (folder / "LICENSE").read_text()
    assert (folder / "gguf-py" / "LICENSE").is_file()
    known = upstream.known_architectures()
    assert {"Gemma3ForConditionalGeneration", "InternVisionModel", "Idefics3ForConditionalGeneration"} <= known
    assert "conversion" not in sys.modules
    assert np.all([name.isidentifier() for name in known])


@pytest.mark.parametrize(
    ("log", "status", "words"),
    [
        (b"INFO:x:y\n  File a, line 1\nOSError: [Errno 28] No space left on device\n", 1, "free some space"),
        (b"Writing: 3%\rWriting: 4%\r", -9, "signal 9.*free some memory"),
        (b"ERROR:hf-to-gguf:Model Foo is not supported\n", 1, "Model Foo is not supported.*supported at all"),
        (b"ValueError: first\n\nDuring handling\nKeyError: 'a.b'\n", 1, "KeyError: 'a.b'"),
        (b"", 3, "exit 3"),
        (b"\xff\xfe odd last words\n", 1, "odd last words"),
    ],
)
def test_the_converters_last_words_are_passed_on(log: bytes, status: int, words: str) -> None:
    message = str(upstream._failure("x", upstream._reason(log, status)))
    assert re.search(words, message)
    assert "\n" not in message
