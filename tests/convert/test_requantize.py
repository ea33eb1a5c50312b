"""An mmproj file in another type: which tensors change, by what bytes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import qap_gguf as qap
from convert.test_mmproj import tensors
from qap_gguf import _core
from qap_gguf.cli.main import main
from qap_gguf.convert import REQUANTIZE_TYPES
from qap_gguf.convert.output.raw_header import read_layout
from qap_gguf.errors import ConvertError, ModelFileError
from qap_gguf.files.gguf import read_gguf

# NMSE of the packaged tower's tokens against those of f32
LIMITS = {"f16": 1e-5, "bf16": 1e-3, "q8_0": 1e-2, "q4_0": 5e-2, "iq4_nl": 5e-2}


@pytest.fixture(scope="module")
def made(plain_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same checkpoint converted to f32 and to q8_0, with pruning defaults."""
    folder, config = tmp_path_factory.mktemp("made"), qap.PruneConfig(n_keep=3)
    return {
        kind: qap.convert(plain_llava, folder / kind, quantize="F32", mmproj_type=kind, prune=config, name="m").mmproj
        for kind in ("f32", "q8_0")
    }


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "GGUF." not in name}


def test_a_float_file_becomes_what_the_checkpoint_becomes(made: dict[str, Path], tmp_path: Path) -> None:
    got = qap.requantize(made["f32"], tmp_path / "new.gguf", "Q8_0")
    want, found = tensors(made["q8_0"]), tensors(got.path)
    assert list(found) == list(want)
    assert keys(got.path) == keys(made["q8_0"])
    changed = 0
    for name, tensor in want.items():
        if tensor.tensor_type.name == "F16":  # rows that are no whole blocks: left in the type that they had
            assert found[name].tensor_type.name == "F32"
            continue
        assert found[name].tensor_type == tensor.tensor_type, name
        np.testing.assert_array_equal(found[name].data, tensor.data, err_msg=name)
        changed += tensor.tensor_type.name == "Q8_0"
    assert got.changed == changed > 10
    (note,) = got.notes
    assert note.startswith("left as they were, rows are no multiple of 32: v.blk.0.ffn_down.weight and ")


def test_back_and_forth_is_the_same_file(made: dict[str, Path], tmp_path: Path) -> None:
    """f32 holds every f16 value; what was f16 and is no product stays, so packaged weights come back bit by bit."""
    packaged = qap.packaged_model().mmproj
    wide = qap.requantize(packaged, tmp_path / "wide.gguf", "f32").path
    back = qap.requantize(wide, tmp_path / "back.gguf", "f16").path
    old, new = tensors(packaged), tensors(back)
    assert list(old) == list(new)
    for name, tensor in old.items():
        assert new[name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(new[name].data, tensor.data, err_msg=name)
    assert keys(back) == keys(packaged)
    assert read_layout(back).data % read_layout(back).alignment == 0


def test_the_file_itself_can_be_replaced(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(made["f32"].read_bytes())
    with pytest.raises(ConvertError, match=r"expected no file .*--force"):
        qap.requantize(path, path, "q8_0")
    seen: list[tuple[int, int, str]] = []
    qap.requantize(path, path, "q8_0", force=True, progress=lambda *step: seen.append(step))
    assert read_gguf(path).tensors["mm.2.weight"][0] == "q8_0"
    assert [done for done, _, _ in seen] == list(range(1, len(tensors(path)) + 1))
    assert qap.PruneConfig.from_metadata(read_gguf(path).metadata) == qap.PruneConfig(n_keep=3)
    assert [file.name for file in tmp_path.iterdir()] == ["mmproj.gguf"]


def test_what_was_rounded_before_is_said_or_refused(made: dict[str, Path], tmp_path: Path) -> None:
    coarse = qap.requantize(made["q8_0"], tmp_path / "q4.gguf", "q4_0")
    assert any("were rounded before" in note for note in coarse.notes)
    with pytest.raises(ConvertError, match=r"expected matrices in f32, f16, bf16, q8_0, got .* in q4_0"):
        qap.requantize(coarse.path, tmp_path / "q8.gguf", "q8_0")
    assert not (tmp_path / "q8.gguf").exists()


def test_values_that_do_not_fit_leave_no_file(make_llava: Any, tmp_path: Path) -> None:
    path = qap.convert(make_llava(), tmp_path / "out", quantize="F32", mmproj_type="f32", name="m").mmproj
    layout = read_layout(path)
    begin = next(tensor.begin for tensor in layout.tensors if tensor.name == "v.blk.1.attn_q.weight")
    for value, message in ((1e6, "expected finite values in f16"), (np.nan, "expected finite values in f32")):
        with path.open("r+b") as file:
            file.seek(begin)
            file.write(np.float32(value).tobytes())
        with pytest.raises(ConvertError, match=rf"v\.blk\.1\.attn_q\.weight: {message}"):
            qap.requantize(path, tmp_path / "new.gguf", "f16")
        assert not (tmp_path / "new.gguf").exists()


def test_other_files_and_types_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "new.gguf"
    with pytest.raises(ConvertError, match="expected mmproj_type f32, f16, bf16, q8_0, q4_0, iq4_nl, got 'q5_0'"):
        qap.requantize(made["f32"], out, "q5_0")
    with pytest.raises(ModelFileError):
        qap.requantize(qap.packaged_model().model, out, "q8_0")
    with pytest.raises(ValueError, match="expected the name of a type of weights"):
        _core.convert_rows(b"\0" * 128, "f32", "q9_9", 32)
    with pytest.raises(ValueError, match="expected whole rows"):
        _core.convert_rows(b"\0" * 124, "f32", "q8_0", 31)


def test_the_command_takes_a_file(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new.gguf"
    assert main(["convert", str(made["f32"]), str(out), "--mmproj-type", "q8_0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out)
    assert "rows are no multiple of 32" in captured.err
    assert main(["convert", str(made["f32"]), str(out), "--mmproj-type", "q8_0", "--n-keep", "3", "--force"]) == 2
    assert "--n-keep has no meaning with --mmproj-type and an mmproj file" in capsys.readouterr().err


def test_the_encoder_runs_with_each(tmp_path: Path) -> None:
    """NMSE of docs/convert.md."""
    packaged = qap.packaged_model()
    features = {}
    for kind in REQUANTIZE_TYPES:
        path = qap.requantize(packaged.mmproj, tmp_path / f"{kind}.gguf", kind).path
        with qap.VisionModel(path, packaged.model, n_threads=1) as vlm:
            features[kind] = vlm.encode(packaged.sample).features
    for kind, limit in LIMITS.items():
        error = float(((features[kind] - features["f32"]) ** 2).sum() / (features["f32"] ** 2).sum())
        print(f"{kind}: NMSE to f32 {error:.1e}")
        assert error < limit
