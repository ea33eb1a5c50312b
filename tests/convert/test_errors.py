"""Damaged, strange and hostile checkpoints, and what a failed conversion leaves behind: nothing."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qap_gguf.convert import api, convert
from qap_gguf.convert.output.writer import cast
from qap_gguf.convert.source.checkpoint import Checkpoint, canonical
from qap_gguf.errors import ConvertError

Change = Callable[[Path], None]
Tensors = dict[str, tuple[str, list[int], bytes]]


def read_safetensors(path: Path) -> Tensors:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    return {
        k: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for k, v in header.items() if k != "__metadata__"
    }


def write_safetensors(path: Path, tensors: Tensors) -> None:
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def copy(plain_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_llava, tmp_path / "copy"))


def edit_tensors(change: Callable[[Tensors], None]) -> Change:
    def apply(folder: Path) -> None:
        tensors = read_safetensors(folder / "model.safetensors")
        change(tensors)
        write_safetensors(folder / "model.safetensors", tensors)

    return apply


def edit_json(name: str, **changes: Any) -> Change:
    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            node = data
            for parent in parents:
                node = node[parent]
            node[last] = value
        (folder / name).write_text(json.dumps(data))

    return apply


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return apply


def find(tensors: Tensors, ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def poison(ending: str, value: float, dtype: str = "F32") -> Change:
    def change(tensors: Tensors) -> None:
        name = find(tensors, ending)
        _, shape, raw = tensors[name]
        values = np.frombuffer(raw, "<f4").copy()
        values[len(values) // 2] = value
        data = values.tobytes()
        if dtype == "BF16":
            data = (values.view("<u4") >> 16).astype("<u2").tobytes()
        elif dtype == "F16":
            data = values.astype("<f2").tobytes()
        tensors[name] = (dtype, shape, data)

    return edit_tensors(change)


def drop(ending: str) -> Change:
    return edit_tensors(lambda t: t.pop(find(t, ending)) and None)


def add(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = ("F32", [2], b"\0" * 8)

    return edit_tensors(change)


def reshape(ending: str, shape: list[int]) -> Change:
    def change(tensors: Tensors) -> None:
        name = find(tensors, ending)
        tensors[name] = (tensors[name][0], shape, tensors[name][2])

    return edit_tensors(change)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def index(**weight_map: str) -> Change:
    return write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


CASES: dict[str, tuple[Change, str]] = {
    "no config": (remove("config.json"), "config.json"),
    "no weights": (remove("model.safetensors"), "save_pretrained"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json or tokenizer.model"),
    "no processor": (remove("preprocessor_config.json"), "preprocessor_config.json or processor_config.json"),
    "config is text": (write("config.json", b"hello"), "as JSON"),
    "config is a list": (write("config.json", b"[]"), "JSON object"),
    "config is binary": (write("config.json", b"\xff\xfe\x00"), "as JSON"),
    "tokenizer is text": (write("tokenizer.json", b"hello"), "as JSON"),
    "tokenizer without model": (write("tokenizer.json", b'{"a": 1}'), "BPE model"),
    "wordpiece": (write("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}'), "WordPiece"),
    "huge token id": (
        edit_json("tokenizer.json", model__vocab={"a": 10**15}),
        "got 1000000000000000 in the tokenizer",
    ),
    "token id of text": (edit_json("tokenizer.json", model__vocab={"a": "x"}), "got 'x' in the tokenizer"),
    "added token without id": (edit_json("tokenizer.json", added_tokens=[{"content": "x"}]), "got None"),
    "added token without text": (edit_json("tokenizer.json", added_tokens=[{"id": 1}]), "cannot understand the token"),
    "decoder of numbers": (edit_json("tokenizer_config.json", added_tokens_decoder={"1": 2}), "cannot understand"),
    "activation is a list": (edit_json("config.json", vision_config__hidden_act=["a"]), "cannot understand config"),
    "rescale by text": (edit_json("preprocessor_config.json", rescale_factor="x"), "cannot understand config"),
    "another model": (edit_json("config.json", model_type="qwen2_vl"), "model_type llava"),
    "full strategy": (edit_json("config.json", vision_feature_select_strategy="full"), "class token"),
    "nan": (poison("layers.1.mlp.up_proj.weight", float("nan")), "NaN or infinity in .*up_proj"),
    "inf": (poison("linear_1.weight", float("inf")), "NaN or infinity in .*linear_1"),
    "nan in a vector": (poison("pre_layrnorm.bias", float("-inf")), "NaN or infinity in .*pre_layrnorm"),
    "bf16 nan": (poison("embed_tokens.weight", float("nan"), "BF16"), "NaN or infinity in .*embed_tokens"),
    "f16 inf": (poison("layers.0.mlp.down_proj.weight", float("inf"), "F16"), "NaN or infinity in .*down_proj"),
    "too large for f16": (poison("linear_2.weight", 1e6), "fit F16.*linear_2"),
    "missing tensor": (drop("layers.1.self_attn.v_proj.weight"), "1 more tensors.*layers.1.self_attn.v_proj.weight"),
    "missing head": (drop("lm_head.weight"), "lm_head"),
    "stranger": (add("language_model.model.layers.0.self_attn.q_norm.weight"), "1 others: .*q_norm"),
    "layer too many": (add("model.language_model.layers.2.input_layernorm.weight"), "others: .*layers.2"),
    "twice": (add("model.language_model.norm.weight"), "each tensor once"),
    "image newline": (add("image_newline"), "image_newline"),
    "shape": (reshape("layers.0.mlp.up_proj.weight", [64, 96]), r"\[96, 64\].*\[64, 96\]"),
    "config of other sizes": (edit_json("config.json", text_config__intermediate_size=100), r"\[100, 64\]"),
    "vocabulary of another size": (edit_json("config.json", text_config__vocab_size=700), r"\[700, 64\]"),
    "patches of another size": (edit_json("config.json", vision_config__image_size=35), r"\[26, 32\]"),
    "tied against the weights": (edit_json("config.json", tie_word_embeddings=True), "equal to the embeddings"),
    "cut short": (truncate, "cut short"),
    "empty weights": (write("model.safetensors", b""), "broken header"),
    "weights are text": (write("model.safetensors", b"<html>not found</html>"), "broken header"),
    "header is not JSON": (write("model.safetensors", struct.pack("<Q", 4) + b"abcd"), "header"),
    "header of lists": (write("model.safetensors", struct.pack("<Q", 9) + b'{"a": []}'), "header"),
    "index without shards": (index(a="model-1.safetensors"), "shard"),
    "index leaves the folder": (index(a="../x.safetensors"), "shard"),
    "index without tensors": (index(a="model.safetensors"), "expected tensor a"),
    "index of numbers": (write("model.safetensors.index.json", b'{"weight_map": {"a": 1}}'), "weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_bad_checkpoints_end_in_one_line_and_leave_nothing(copy: Path, tmp_path: Path, case: str) -> None:
    change, words = CASES[case]
    change(copy)
    with pytest.raises(ConvertError, match=words) as caught:
        convert(copy, tmp_path / "out", quantize="Q8_0")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(("expected ", "cannot "))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "I64"])
def test_quantized_checkpoints_are_refused(copy: Path, tmp_path: Path, dtype: str) -> None:
    def change(tensors: Tensors) -> None:
        name = find(tensors, "layers.0.mlp.up_proj.weight")
        size = 8 if dtype == "I64" else 1
        tensors[name] = (dtype, [96, 64], b"\0" * (96 * 64 * size))

    edit_tensors(change)(copy)
    with pytest.raises(ConvertError, match="not quantized"):
        convert(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "Q9_X"}, "Q4_K_M"),
        ({"quantize": 4}, "Q4_K_M"),
        ({"mmproj_type": "q4_0"}, "f32, f16, bf16, q8_0"),
        ({"name": ""}, "name"),
        ({"name": "../up"}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": "MMPROJ"}, "name"),
    ],
)
def test_bad_options(plain_llava: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConvertError, match=words) as caught:
        convert(plain_llava, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_quantizers_refusal_is_passed_on(make_llava: Any, tmp_path: Path) -> None:
    """Rows of 256 floats leave no fallback for a type that needs an importance matrix."""
    folder = make_llava(text={"hidden_size": 256, "intermediate_size": 256, "head_dim": 64})
    with pytest.raises(ConvertError, match="imatrix") as caught:
        convert(folder, tmp_path / "out", quantize="IQ1_S")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_without_force(plain_llava: Path, tmp_path: Path) -> None:
    for taken in ("mmproj-f16.gguf", "t-F16.gguf"):
        out = tmp_path / taken.replace(".", "_")
        out.mkdir()
        (out / taken).write_text("mine")
        with pytest.raises(ConvertError, match="force"):
            convert(plain_llava, out, quantize="F16", name="t")
        assert {p.name: p.read_text() for p in out.iterdir()} == {taken: "mine"}
        convert(plain_llava, out, quantize="F16", name="t", force=True)
        assert sorted(p.name for p in out.iterdir()) == ["mmproj-f16.gguf", "t-F16.gguf"]
        assert (out / taken).read_bytes()[:4] == b"GGUF"


def test_a_file_that_appears_meanwhile_is_kept(plain_llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def progress(done: int, total: int, _: str) -> None:
        if done == total:
            (out / "t-F16.gguf").write_text("mine")

    with pytest.raises(ConvertError, match="force"):
        convert(plain_llava, out, quantize="F16", name="t", progress=progress)
    assert {p.name: p.read_text() for p in out.iterdir()} == {"t-F16.gguf": "mine"}


def test_out_that_is_a_file_or_holds_a_folder(plain_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConvertError, match="folder to write to"):
        convert(plain_llava, tmp_path / "file")
    (tmp_path / "mmproj-f16.gguf").mkdir()
    with pytest.raises(ConvertError, match="got a folder"):
        convert(plain_llava, tmp_path, force=True)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("when", [0.1, 0.6, 0.9, 1.0])
def test_any_exception_leaves_nothing(
    plain_llava: Path, tmp_path: Path, error: type[BaseException], when: float, kind: str
) -> None:
    out = tmp_path / "out"

    def progress(done: int, total: int, _: str) -> None:
        if done >= when * total:
            assert [p for p in out.iterdir() if p.suffix == ".qap-tmp"]
            raise error("stop")

    with pytest.raises(error, match="stop"):
        convert(plain_llava, out, quantize=kind, progress=progress)
    assert not out.exists()


def test_a_failing_rename_takes_the_first_file_back(
    plain_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name.startswith("mmproj"):
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ConvertError, match="disk full"):
        convert(plain_llava, tmp_path / "out", quantize="F16", force=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_progress_rises_to_the_total(plain_llava: Path, tmp_path: Path, kind: str) -> None:
    seen: list[tuple[int, int, str]] = []
    convert(plain_llava, tmp_path, quantize=kind, progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(set(done))
    assert (done[-1], {step[1] for step in seen}) == (seen[-1][1], {seen[-1][1]})


def test_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    """A plan's values are made when they are written, and freed after: no list of arrays is ever held."""
    import tracemalloc

    from qap_gguf.convert.output.writer import TensorPlan, write_gguf
    from qap_gguf.convert.source.checkpoint import TensorRef

    rows, columns, count = 512, 1024, 12
    raw = tmp_path / "raw"
    raw.write_bytes(np.ones((count, rows, columns), "<f4").tobytes())
    size = rows * columns * 4
    plans = [
        TensorPlan(f"t{i}", TensorRef(f"t{i}", raw, "F32", (rows, columns), i * size), "F16", (rows, columns))
        for i in range(count)
    ]
    tracemalloc.start()
    write_gguf(tmp_path / "x.gguf", "llama", {}, plans, lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * size


def test_bfloat16_rounds_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(5).standard_normal(10000).astype("<f4") * 10.0 ** np.arange(-30, 30).repeat(
        10000 // 60 + 1
    )[:10000].astype("<f4")
    want = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view("<u2")
    np.testing.assert_array_equal(cast(x, "F32", "BF16", "x"), want)
    with pytest.raises(ConvertError, match="fit BF16"):
        cast(np.array([3.4e38], "<f4"), "F32", "BF16", "x")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.class_embedding"),
        ("vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.vision_model.post_layernorm.bias"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_names_of_all_layouts(old: str, new: str) -> None:
    assert canonical(old) == canonical(new) == old


def test_the_default_name_is_the_folders(plain_llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain_llava, tmp_path / "-my model (v1.5)")
    assert convert(folder, tmp_path, quantize="F16").model.name == "my-model-v1.5-F16.gguf"


def test_a_full_disk_is_one_line(plain_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import gguf

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ConvertError, match="No space left"):
        convert(plain_llava, tmp_path / "out", quantize="F16")
    assert not (tmp_path / "out").exists()


def test_f64_and_empty_folders(copy: Path, tmp_path: Path) -> None:
    edit_tensors(
        lambda t: t.update(
            {n: ("F64", s, np.frombuffer(r, "<f4").astype("<f8").tobytes()) for n, (_, s, r) in t.items()}
        )
    )(copy)
    assert {ref.dtype for ref in Checkpoint(copy).tensors.values()} == {"F64"}
    plain = convert(copy, tmp_path / "out", quantize="F32", name="t")
    assert plain.model.stat().st_size > 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvertError, match=r"config\.json, found none"):
        convert(tmp_path / "empty", tmp_path / "out2")
    assert api.convert is convert
