"""The language model's file: metadata, tensors, and the logits that libllama computes from it, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from qap_gguf.convert import QUANTIZE_TYPES, convert
from qap_gguf.convert.llava.language import interleave
from qap_gguf.convert.source.checkpoint import Checkpoint

llama_cpp = pytest.importorskip("llama_cpp")
Array = npt.NDArray[Any]


def fields(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def as_float(array: Array, dtype: str) -> Array:
    return (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array.astype("<f4")


def nmse(got: Array, want: Array) -> float:
    """Squared error relative to the spread of each row: a mean that softmax ignores must not hide an error."""
    centred = want - want.mean(axis=1, keepdims=True)
    return float(((got - want) ** 2).sum() / (centred**2).sum())


def logits(path: Path, ids: list[int]) -> Array:
    """libllama's logits after each token, (n, n_vocab); F32 everywhere, so that only the order of sums differs."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=256,
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
        n_threads=2,
    )
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)])
    finally:
        model.close()


def reference_logits(folder: Path, ids: list[int]) -> Array:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out: Array = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return out


def check_logits(folder: Path, out: Path, ids: list[int], limit: float = 1e-5) -> None:
    result = convert(folder, out, quantize="F32", mmproj_type="f32", keep_positions=False)
    want = reference_logits(folder, ids)
    error = nmse(logits(result.model, ids), want)
    print(f"logits NMSE {error:.1e}")
    assert error <= limit
    assert nmse(np.roll(want, 1, axis=1), want) > 0.1  # the limit means something


IDS = [1, 300, 44, 520, 7, 99, 100, 101, 410, 639, 12, 5, 300, 300, 44, 2]


@pytest.mark.parity
@pytest.mark.parametrize(
    "text",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "head_dim": None},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ],
    ids=["gqa", "tied", "biases", "mqa", "linear-rope", "llama3-rope"],
)
def test_logits_equal_transformers(make_llava: Any, tmp_path: Path, text: dict[str, Any]) -> None:
    check_logits(make_llava(text=text), tmp_path, IDS)


FULL = {"num_key_value_heads": 4, "head_dim": 16}
LLAMAS = {
    "vicuna": ("Llama", FULL | {"rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"rope_theta": 1e6, "sliding_window": None, "hidden_size": 48}),
    "mistral, a wide window": ("Mistral", {"sliding_window": 100}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "head_dim": 16, "rope_scaling": None}),
    "qwen2, tied": ("Qwen2", FULL | {"tie_word_embeddings": True, "use_sliding_window": False}),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", list(LLAMAS))
def test_logits_of_other_language_models(make_llava: Any, tmp_path: Path, name: str) -> None:
    language, text = LLAMAS[name]
    check_logits(make_llava(text=text, language=language), tmp_path, IDS)
    got = fields(next(tmp_path.glob("ckpt-F32.gguf")))
    arch = got["general.architecture"]
    assert arch == ("qwen2" if language == "Qwen2" else "llama")
    # Beyond the window llama.cpp's attention would see more than the model did in training.
    assert got[f"{arch}.context_length"] == (100 if "window" in name else 256)


@pytest.mark.parity
def test_logits_of_tiny_llava(tiny_llava: Path, tmp_path: Path) -> None:
    ids = [1, 4093, 198, 1780, 314, 281, 4505, 216, 34, 28, 4556, 216, 35, 47, 2, 198, 1, 520, 9531, 198]
    check_logits(tiny_llava, tmp_path, ids)


@pytest.mark.parity
def test_logits_of_a_bf16_checkpoint(make_llava: Any, tmp_path: Path) -> None:
    check_logits(make_llava(dtype="bfloat16"), tmp_path, IDS)


SHAPES = {  # PyTorch's order
    "token_embd.weight": (656, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.attn_q.weight": (128, 64),
    "blk.0.attn_k.weight": (64, 64),
    "blk.0.attn_v.weight": (64, 64),
    "blk.0.attn_output.weight": (64, 128),
    "blk.0.ffn_gate.weight": (96, 64),
    "blk.0.ffn_up.weight": (96, 64),
    "blk.0.ffn_down.weight": (64, 96),
    "output_norm.weight": (64,),
    "output.weight": (656, 64),
}


def test_golden_metadata(plain_llava: Path, tmp_path: Path) -> None:
    result = convert(plain_llava, tmp_path, quantize="F16", name="tiny", keep_positions=False)
    assert result.model == tmp_path / "tiny-F16.gguf"
    got = fields(result.model)
    tokens, types = got.pop("tokenizer.ggml.tokens"), got.pop("tokenizer.ggml.token_type")
    merges = got.pop("tokenizer.ggml.merges")
    assert got == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.vocab_size": 656,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}<|im_end|>",
    }
    assert len(tokens) == len(types) == 656
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert types[:3] == [3, 3, 3]
    assert (tokens[640], types[640]) == ("<box>", 4)
    assert (tokens[655], types[655]) == ("[PAD655]", 5)
    assert set(types[3:640]) == {1}
    assert all(len(merge.split(" ")) == 2 for merge in merges)
    listing = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors(result.model).items()}
    second = {name.replace("blk.0", "blk.1"): shape for name, shape in SHAPES.items()}
    assert listing == SHAPES | second
    for name, tensor in tensors(result.model).items():
        assert tensor.tensor_type.name == ("F32" if "norm" in name else "F16"), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("save", [{}, {"max_shard_size": "100KB"}], ids=["single", "sharded"])
def test_tensors_equal_the_checkpoint(make_llava: Any, tmp_path: Path, dtype: str, save: dict[str, Any]) -> None:
    folder = make_llava(dtype=dtype, save=save)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(save)
    result = convert(folder, tmp_path, quantize="F32", name="t", keep_positions=False)
    source, got = Checkpoint(folder).tensors, tensors(result.model)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    pairs = {f"layers.{i}.{a}.weight": f"blk.{i}.{b}.weight" for i in range(2) for a, b in names.items()}
    pairs |= {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    pairs = {f"language_model.model.{a}": b for a, b in pairs.items()} | {
        "language_model.lm_head.weight": "output.weight"
    }
    assert set(pairs.values()) == set(got)
    for theirs, ours in pairs.items():
        ref = source[theirs]
        want, data = as_float(ref.read(), ref.dtype), got[ours].data
        n_head = 4 if "q_proj" in theirs else 2
        if "q_proj" in theirs or "k_proj" in theirs:  # undo the permutation: pairs back to halves
            data = data.reshape(n_head, 16, 2, 64).transpose(0, 2, 1, 3).reshape(want.shape)
        np.testing.assert_array_equal(data, want, err_msg=theirs)


def test_interleave_keeps_heads_apart() -> None:
    rows = np.arange(16).reshape(16, 1)
    assert interleave(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize("save_original_format", [True, False])
def test_old_and_new_key_layouts_give_the_same_file(
    make_llava: Any, plain_llava: Path, tmp_path: Path, save_original_format: bool
) -> None:
    other = make_llava(save={"save_original_format": save_original_format})
    a = convert(plain_llava, tmp_path / "a", quantize="F16", name="t")
    b = convert(other, tmp_path / "b", quantize="F16", name="t")
    assert a.model.read_bytes() == b.model.read_bytes()
    assert a.mmproj.read_bytes() == b.mmproj.read_bytes()


def test_tied_embeddings_are_stored_once(make_llava: Any, tmp_path: Path) -> None:
    result = convert(make_llava(text={"tie_word_embeddings": True}), tmp_path, quantize="F16")
    assert "output.weight" not in tensors(result.model)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("Q8_0", 1e-4),
        ("Q6_K", 1e-3),
        ("Q5_1", 3e-3),
        ("q4_k", 1e-2),
        ("Q4_0", 1e-2),
        ("IQ4_NL", 1e-2),
        ("Q2_K", 0.1),
        ("BF16", 1e-5),
    ],
)
def test_quantized_weights_are_near_and_load(plain_llava: Path, tmp_path: Path, kind: str, limit: float) -> None:
    """The rows of 64 and 128 floats are no multiple of 256: llama.cpp falls back by itself."""
    result = convert(plain_llava, tmp_path, quantize=kind, name="t")
    name = {"q4_k": "Q4_K_M"}.get(kind, kind)
    assert result.model.name == f"t-{name}.gguf"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mmproj-f16.gguf", result.model.name]
    assert fields(result.model)["general.file_type"] == QUANTIZE_TYPES[name]
    exact = tensors(convert(plain_llava, tmp_path / "exact", quantize="F32", name="t").model)
    for key, tensor in tensors(result.model).items():
        want = exact[key].data
        got = gguf.dequantize(tensor.data, tensor.tensor_type)
        error = float(((got - want) ** 2).sum() / (want**2).sum())
        assert error <= (limit if want.ndim > 1 else 0), (key, tensor.tensor_type.name)
    assert np.isfinite(logits(result.model, IDS)).all()


def test_quantize_types_are_llama_cpps() -> None:
    constants = {k: v for k, v in vars(llama_cpp).items() if k.startswith("LLAMA_FTYPE_")}
    for name, number in QUANTIZE_TYPES.items():
        known = constants.get("LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}")
        assert known in (None, number), name  # the bindings lack the newest ones


def test_packaged_model_is_what_its_readme_says(tiny_llava: Path, tmp_path: Path) -> None:
    packaged = Path(__file__).resolve().parents[2] / "python" / "qap_gguf" / "models" / "tiny_llava"
    result = convert(tiny_llava, tmp_path, quantize="Q4_0", name="tiny-llava", keep_positions=True)
    for path in (result.mmproj, result.model):
        assert path.read_bytes() == (packaged / path.name).read_bytes()
    assert not [key for key in fields(result.mmproj) if key.startswith("qap.")]
