"""Strangers' files are tried in a process of its own (files/trial.py): what ends that one is a line in this one."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
import strangers
from dropin.children import outcome
from gguf_mutations import STRING, Gguf, Key, Tensor, write
from qap_gguf import _core
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.files import trial
from qap_gguf.files.gguf import check_language, check_mmproj
from qap_gguf.files.trial import Job, check_trial, why_not
from tiny_mmproj import tiny_mmproj

U32, F32_KEY, ARRAY = 4, 6, 9
Refuse = Callable[..., str]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a Linux process")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own: nothing is known from runs before."""
    monkeypatch.setenv("QAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tried"


@pytest.fixture(scope="module")
def model(plain_model: Path) -> Gguf:
    return strangers.short_model(Gguf(plain_model.read_bytes()))


def u32(value: int) -> tuple[int, bytes]:
    return U32, struct.pack("<I", value)


def text(value: str) -> tuple[int, bytes]:
    return STRING, struct.pack("<Q", len(value)) + value.encode()


def with_keys(file: Gguf, keys: dict[str, tuple[int, bytes]], arch: str | None = None) -> bytes:
    """The file with other keys; with `arch`, all keys of llama become those of that architecture."""
    rows = [Key(key.name, *keys.pop(key.name.decode(), (key.kind, key.value)), key.at) for key in file.keys]
    rows += [Key(name.encode(), *value, 0) for name, value in keys.items()]
    if arch is not None:
        rows = [Key(key.name.replace(b"llama.", f"{arch}.".encode()), key.kind, key.value, 0) for key in rows]
        rows = [Key(key.name, *text(arch), 0) if key.name == b"general.architecture" else key for key in rows]
    return write(rows, file.tensors)


def aligned(file: Gguf, alignment: int) -> bytes:
    """The file with data laid out for that alignment, after an odd number of bytes."""
    keys = [*file.keys, Key(b"general.alignment", *u32(alignment), 0), Key(b"general.odd", *text("o"), 0)]
    head = [b"GGUF", struct.pack("<IQQ", 3, len(file.tensors), len(keys))]
    for key in keys:
        head += [struct.pack("<Q", len(key.name)), key.name, struct.pack("<I", key.kind), key.value]
    offset, blobs = 0, []
    for tensor in file.tensors:
        head += [struct.pack("<Q", len(tensor.name)), tensor.name, struct.pack("<I", len(tensor.dims))]
        head += [struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims), struct.pack("<IQ", tensor.kind, offset)]
        padded = -(-len(tensor.data) // alignment) * alignment
        blobs.append(tensor.data + bytes(padded - len(tensor.data)))
        offset += padded
    start = b"".join(head)
    return start + bytes(-len(start) % alignment) + b"".join(blobs)


def duplicate_token(file: Gguf) -> bytes:
    """Token 5 is spelled as token 4."""
    keys = []
    for key in file.keys:
        if key.name == b"tokenizer.ggml.tokens":
            kind, n = struct.unpack_from("<IQ", key.value)
            at, items = 12, []
            for _ in range(n):
                (length,) = struct.unpack_from("<Q", key.value, at)
                items.append(key.value[at + 8 : at + 8 + length])
                at += 8 + length
            items[5] = items[4]
            value = struct.pack("<IQ", kind, n) + b"".join(struct.pack("<Q", len(t)) + t for t in items)
            keys.append(Key(key.name, ARRAY, value, 0))
        else:
            keys.append(key)
    return write(keys, file.tensors)


#: language models on which libllama ends the process that loads them -> words of its assertion
DEADLY: dict[str, tuple[Callable[[Gguf], bytes], str]] = {
    "duplicate token": (duplicate_token, "id_to_token.size() == token_to_id.size()"),
    "block_count": (lambda f: with_keys(f, {"llama.block_count": u32(65536)}), "n_layer_all"),
    "expert_count": (lambda f: with_keys(f, {"llama.expert_count": u32(1)}), "n_expert_used_max > 0"),
    "nextn": (lambda f: with_keys(f, {"llama.nextn_predict_layers": u32(7)}), "n_layer_nextn <= hparams.n_layer_all"),
    "rope": (lambda f: with_keys(f, {"llama.rope.scaling.type": text("su")}), "rope_scaling_type_train"),
}


@pytest.mark.parametrize("name", DEADLY)
def test_the_child_names_the_assertion(tmp_path: Path, model: Gguf, name: str, cache: Path) -> None:
    make, words = DEADLY[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(make(model))
    with pytest.raises(ModelFileError) as error:
        check_trial(None, path)
    line = str(error.value)
    assert f"{path}: reading the language model ends the process (" in line
    assert "GGML_ASSERT(" in line
    assert words in line
    assert "\n" not in line
    assert not cache.exists()


@pytest.mark.parametrize("name", DEADLY)
def test_the_gate_knows_them_first(tmp_path: Path, model: Gguf, name: str, packaged: qap.PackagedModel) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(DEADLY[name][0](model))
    report = qap.check_files(packaged.mmproj, path)
    assert not report.ok
    assert (report.files[1].error or "").startswith("expected ")
    with pytest.raises(ModelFileError, match="expected"):
        qap.VisionModel(packaged.mmproj, path, n_threads=1)


@pytest.mark.parametrize("alignment", [1, 2, 8, 16])
def test_alignments_that_ggml_asserts_on(
    tmp_path: Path, model: Gguf, alignment: int, packaged: qap.PackagedModel, refused: Refuse
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(aligned(model, alignment))
    line = refused("--mmproj", packaged.mmproj, "-m", path)
    assert f"expected a general.alignment of 32 or a larger power of two, got {alignment}" in line
    (file,) = qap.check_files(path).files
    assert "general.alignment" in (file.error or "")


def test_larger_alignments_run(tmp_path: Path, model: Gguf, packaged: qap.PackagedModel) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(aligned(model, 64))
    with qap.VisionModel(packaged.mmproj, path, n_ctx=256, n_threads=1, check="child") as vlm:
        assert vlm.generate(["How many?"], max_tokens=1)


@pytest.mark.parametrize("offset", [16, 64, 2**40])
def test_offsets_that_overlap_or_leave_the_file(
    tmp_path: Path, model: Gguf, offset: int, packaged: qap.PackagedModel, refused: Refuse
) -> None:
    whole = bytearray(write(model.keys, model.tensors))
    row = Gguf(bytes(whole)).tensors[1]
    at = row.at + 8 + len(row.name) + 4 + 8 * len(row.dims) + 4
    whole[at : at + 8] = struct.pack("<Q", offset)
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    assert "damaged" in refused("--mmproj", packaged.mmproj, "-m", path)
    assert not qap.check_files(path).ok


def test_a_file_that_passed_is_known_by_its_content(
    tmp_path: Path, packaged: qap.PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(packaged.model.read_bytes())
    check_trial(packaged.mmproj, path)
    assert len(list(cache.iterdir())) == 1

    def no_child(_jobs: object) -> Any:
        raise AssertionError("a child was started")

    monkeypatch.setattr(trial, "_child", no_child)
    started = time.process_time()
    check_trial(packaged.mmproj, path)
    assert time.process_time() - started < 0.3  # the header is read, with a vocabulary of 49,152; of no weights
    moved = path.rename(tmp_path / "moved.gguf")
    check_trial(packaged.mmproj, moved)
    os.utime(moved, (1, 1))
    with pytest.raises(AssertionError, match="a child"):
        check_trial(packaged.mmproj, moved)


def test_the_packaged_files_need_no_child(packaged: qap.PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_child", lambda jobs: ["never"] * len(jobs))
    assert why_not([Job(packaged.mmproj, packaged.model), Job(None, packaged.model)]) == [None, None]


def test_one_deadly_file_among_others(tmp_path: Path, model: Gguf, packaged: qap.PackagedModel) -> None:
    """The jobs after it are tried in another child."""
    deadly, good = tmp_path / "deadly.gguf", tmp_path / "good.gguf"
    deadly.write_bytes(duplicate_token(model))
    good.write_bytes(packaged.model.read_bytes())
    found = why_not([Job(None, good), Job(None, deadly), Job(packaged.mmproj, good), Job(None, deadly)])
    assert [reason is None for reason in found] == [True, False, True, False]


def test_memory_and_time_are_limited(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    code = (
        "import sys, time; from qap_gguf import load_trial; load_trial._MEMORY = 1 << 28;"
        "load_trial._CPU_SECONDS = 1;"
        "load_trial._core.try_model = lambda *_: {fault};"
        "load_trial.main(sys.argv[1])"
    )
    words = f'[[null, "{packaged.model}", true]]'
    done = subprocess.run(
        [sys.executable, "-c", code.format(fault="bytearray(1 << 31)"), words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "loading takes more memory" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code.format(fault="[0 for _ in iter(int, 1)]"), words],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode < 0
    assert trial._ending(done.returncode, done.stderr) == "took too long"


def test_checks_have_names(packaged: qap.PackagedModel) -> None:
    with pytest.raises(ConfigError, match="check: expected one of gate, child, none, got 'all'"):
        qap.VisionModel(packaged.mmproj, packaged.model, check="all")
    with qap.VisionModel(packaged.mmproj, packaged.model, n_ctx=64, n_threads=1, check="none"):
        pass


ABORT = """
import ctypes, sys
from qap_gguf.cli import main
import llama_cpp, pathlib
base = ctypes.CDLL(str(next((pathlib.Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
def fail(*_words):
    base.ggml_abort(b"/where/it/was/built/ggml.c", 12, b"GGML_ASSERT(n > 0) failed")
sys.modules["qap_gguf.cli.main"].cli.callback = fail
main(["info"])
"""


def test_an_assertion_in_a_command_is_one_line() -> None:
    done = outcome([sys.executable, "-c", ABORT])
    assert done.returncode == 1
    assert done.stderr == (
        "qap-gguf: error: llama.cpp stops at ggml.c:12: GGML_ASSERT(n > 0) failed; "
        "check the files with qap-gguf convert --check\n"
    )


def many(n_keys: int, n_tensors: int) -> bytes:
    keys = [Key(b"general.architecture", *text("clip"), 0), Key(b"clip.has_vision_encoder", 7, b"\1", 0)]
    keys += [Key(f"k.{i}".encode(), *u32(i), 0) for i in range(n_keys - 2)]
    return write(keys, [Tensor(f"t.{i}".encode(), [1], 0, b"\0\0\0\0", 0) for i in range(n_tensors)])


@pytest.mark.parametrize(("n_keys", "n_tensors"), [(300_000, 1), (2, 70_000)])
def test_many_keys_and_tensors_cost_seconds(
    tmp_path: Path, packaged: qap.PackagedModel, n_keys: int, n_tensors: int, refused: Refuse
) -> None:
    path = tmp_path / "many.gguf"
    path.write_bytes(many(n_keys, n_tensors))
    line = refused("--mmproj", path, "-m", packaged.model)  # has its own limit of time
    assert f"at most 10000 keys and 32768 tensors, got {n_keys} and {n_tensors}" in line


def test_a_model_that_cannot_generate(
    tmp_path: Path, model: Gguf, packaged: qap.PackagedModel, refused: Refuse
) -> None:
    """Found by tools/fuzz/strangers.py: an encoder has no KV cache."""
    path = tmp_path / "encoder.gguf"
    path.write_bytes(with_keys(model, {}, "eurobert"))
    assert "expected a language model that generates" in refused("--mmproj", packaged.mmproj, "-m", path)


@pytest.fixture(scope="module")
def architectures() -> list[str]:
    import gguf

    return sorted(name for name in gguf.MODEL_ARCH_NAMES.values() if name not in ("clip", "mmproj"))


#: kind and name of files that pass the gate and end the process that loads them -> words of upstream's assertion
OTHERS = {
    ("model", "smallthinker"): "n_expert must be > 0",
    ("mmproj", "yasa2"): "ggml_can_mul_mat(a, b)",
}


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_families_without_rules(
    tmp_path: Path, model: Gguf, packaged: qap.PackagedModel, refused: Refuse, kind: str, name: str
) -> None:
    """Found by tools/fuzz/strangers.py; the same line from the command, from check_files, and from Python."""
    words, path = OTHERS[kind, name], tmp_path / f"{name}.gguf"
    file = model if kind == "model" else Gguf(tiny_mmproj("qwen2vl_merger"))
    path.write_bytes(strangers.named(file, name, kind).whole)
    pair = (packaged.mmproj, path) if kind == "model" else (path, packaged.model)
    check_language(path, memory=False) if kind == "model" else check_mmproj(path, memory=False)
    assert words in refused("--mmproj", pair[0], "-m", pair[1])
    (found,) = qap.check_files(path).files
    assert words in (found.error or "")
    with pytest.raises(ModelFileError, match=re.escape(words)):
        qap.VisionModel(*pair, n_threads=1, check="child")


def test_every_architecture_in_a_contradictory_file(tmp_path: Path, model: Gguf, architectures: list[str]) -> None:
    """llama's keys and tensors under another name: whatever becomes of it, this process lives and has a line for it."""
    found: list[str | None] = []
    for group in (architectures[i : i + 8] for i in range(0, len(architectures), 8)):
        paths = [tmp_path / f"{arch}.gguf" for arch in group]
        for arch, path in zip(group, paths, strict=True):
            path.write_bytes(with_keys(model, {}, arch))
        found += why_not([Job(None, path) for path in paths])
        for path in paths:
            path.unlink()
    assert len(found) == len(architectures)
    assert all("\n" not in (reason or "") for reason in found)


@pytest.mark.parametrize(
    ("kind", "key"), [("mmproj", b"clip.projector_type"), ("model", b"general.architecture"), ("model", b"\xff\xfe")]
)
def test_words_that_are_no_utf8(
    tmp_path: Path, model: Gguf, packaged: qap.PackagedModel, kind: str, key: bytes
) -> None:
    """Names and keys of a file come back in errors: readable, and as the error that they belong to."""
    file = model if kind == "model" else Gguf(tiny_mmproj("idefics3"))
    value = struct.pack("<Q", 4) + b"a\xff\xc3b"
    keys = [Key(k.name, STRING, value, 0) if k.name == key else k for k in file.keys]
    keys += [] if any(k.name == key for k in keys) else [Key(key, STRING, value, 0)]
    path = tmp_path / "file.gguf"
    path.write_bytes(write(keys, file.tensors))
    assert _core.gguf_info(str(path))[0][key.decode(errors="replace")] == "a\ufffd\ufffdb"
    report = qap.check_files(path, packaged.mmproj if kind == "model" else packaged.model)
    if key == b"\xff\xfe":
        return  # a key that nobody asks for
    inspect = _core.inspect_model if kind == "model" else lambda name: _core.inspect_mmproj(name, None)
    with pytest.raises(RuntimeError, match="a\ufffd\ufffdb"):
        inspect(str(path))
    assert not report.ok
