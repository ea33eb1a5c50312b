"""Files of a true shape: as many weights as the checkpoint has, whole files only, and models that llama.cpp loads."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

import qap_gguf as qap
from qap_gguf.bench import random_files
from qap_gguf.bench.random_files import RandomModel, make_random_model, n_bytes
from qap_gguf.bench.shapes import SHAPES, Shape, find_shape, language_tensors, vision_tensors
from qap_gguf.errors import ConfigError, ConvertError
from qap_gguf.generation.chat_formats import VICUNA

# Parameters of the checkpoints as others counted them in public code and notes: llava-hf/llava-1.5-7b-hf with
# transformers and in the headers of its files, SmolVLM-256M in transformers, Qwen2.5-VL-3B in its own and in its
# fine-tunes' records, Gemma 3 4B in the index of its files, InternVL3 1B on its card (938.19M). We have not had these
# files ourselves. LLaVA's hold a 24th layer of the encoder and a norm after it that nothing uses; our files, as those
# of `qap-gguf convert`, do not.
UNUSED = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 2 * 2048 + 2048
PARAMETERS = {
    "llava-1.5-7b": 7_063_427_072 - UNUSED,
    "smolvlm-256m": 256_484_928,
    "qwen2.5-vl-3b": 3_754_622_976,
    "gemma-3-4b": 4_300_079_472,
    "internvl3-1b": 938_193_024,
}
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_as_many_weights_as_the_checkpoint(name: str) -> None:
    shape = find_shape(name)
    tensors = language_tensors(shape.language) + vision_tensors(shape.vision, shape.language.n_embd)
    assert sum(math.prod(tensor.shape) for tensor in tensors) == PARAMETERS[name]


def test_an_unknown_shape_is_one_line() -> None:
    with pytest.raises(ConfigError, match="expected one of llava"):
        find_shape("gpt-9")


def tiny(name: str) -> Shape:
    """The same family, small: two layers, narrow, few patches."""
    shape = find_shape(name)
    language = dataclasses.replace(
        shape.language, n_vocab=512, n_embd=256, n_layer=2, n_ff=256, n_head=2, n_head_kv=1,
        rope_sections=(16, 24, 24, 0) if shape.language.rope_sections else (),
        head_dim=64 if shape.language.head_dim else 0,
    )  # fmt: skip
    extra = tuple((key, 64 if key == "preproc_image_size" else number) for key, number in shape.vision.extra)
    sizes = {
        "mlp": (56, 14),
        "idefics3": (64, 16),
        "qwen2.5vl_merger": (56, 14),
        "gemma3": (128, 16),
        "internvl": (64, 16),
    }
    image, patch = sizes[shape.vision.projector]
    vision = dataclasses.replace(
        shape.vision, n_embd=64, n_layer=2, n_ff=96, n_head=2, image=image, patch=patch, extra=extra
    )
    return Shape(f"tiny-{name}", language, vision)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RandomModel]:
    folder = tmp_path_factory.mktemp("shapes")
    return {name: make_random_model(tiny(name), folder) for name in SHAPES}


def test_llavas_template_has_about_as_many_tokens_as_in_its_own_vocabulary(made: dict[str, RandomModel]) -> None:
    text = (VICUNA.system or "").encode()
    with qap.VisionModel(made["llava-1.5-7b"].mmproj, made["llava-1.5-7b"].model, n_ctx=256, n_threads=1) as vlm:
        ids = vlm.language_model.tokenize(text, add_bos=False, special=True)
        assert b"".join(vlm.language_model.detokenize([i], special=True) for i in ids) == text
    assert 25 <= len(ids) <= 35  # a token for each word and mark; 164 letters


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_loads_every_family_and_encodes(name: str, made: dict[str, RandomModel]) -> None:
    with qap.VisionModel(made[name].mmproj, made[name].model, n_ctx=256, n_threads=1) as vlm:
        assert vlm.why_not_prunable is None
        image = vlm.encode(NOISE)
        assert image.features.shape[1] == 256
        assert np.isfinite(image.features).all()
        answer = vlm.generate([image, "a"], max_tokens=2, stream=True)
        assert "".join(answer) is not None
        assert np.isfinite(vlm.last_logits()).all()


def test_types_are_those_of_a_q4_0_file(made: dict[str, RandomModel]) -> None:
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made["llava-1.5-7b"].model).tensors}
    assert kinds["output.weight"] == "Q6_K"
    assert {kinds[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_down")} == {"Q4_0"}
    assert kinds["token_embd.weight"] == "Q4_0"
    tied = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made["qwen2.5-vl-3b"].model).tensors}
    assert tied["token_embd.weight"] == "Q6_K"
    assert "output.weight" not in tied


def test_random_weights_have_the_size_that_was_meant(made: dict[str, RandomModel]) -> None:
    for tensor in gguf.GGUFReader(made["llava-1.5-7b"].model).tensors:
        if tensor.tensor_type.name in ("Q4_0", "Q6_K"):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.std(values) == pytest.approx(0.5 * values.shape[-1] ** -0.5, rel=0.1)


def test_files_are_made_once_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, steps = tiny("llava-1.5-7b"), []
    files = make_random_model(shape, tmp_path, lambda done, total, _: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == len(steps)
    stamps = [path.stat().st_mtime_ns for path in (files.model, files.mmproj)]
    again = make_random_model(shape, tmp_path, lambda *_: pytest.fail("made again"))
    assert [path.stat().st_mtime_ns for path in (again.model, again.mmproj)] == stamps
    twin = make_random_model(shape, tmp_path / "twin")
    assert twin.model.read_bytes() == files.model.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_random_model(shape, tmp_path / "broken", interrupted)
    assert not (tmp_path / "broken").exists()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ConvertError, match="GB free"):
        make_random_model(tiny("llava-1.5-7b"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("QAP_CACHE", raising=False)
    assert random_files.cache_folder() == tmp_path / "xdg" / "qap_gguf" / "shapes"
    monkeypatch.setenv("QAP_CACHE", str(tmp_path / "own"))
    assert random_files.cache_folder() == tmp_path / "own" / "shapes"


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_in_bytes_are_those_of_the_file(name: str, made: dict[str, RandomModel]) -> None:
    expected = {tensor.name: n_bytes(tensor) for tensor in language_tensors(tiny(name).language)}
    assert {t.name: t.n_bytes for t in gguf.GGUFReader(made[name].model).tensors} == expected
