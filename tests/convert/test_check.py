"""`check_files`: kinds, widths, signals, defaults, and the warnings about stock llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap
from convert import gguf_files as files
from convert.gguf_files import CLASS_TOKEN, LLAVA_KEYS, LLAVA_TENSORS, build, with_key
from qap_gguf import _core
from qap_gguf.convert.defects import _TABLE, RELABELLED, find_defects
from qap_gguf.errors import ConvertError
from qap_gguf.files.gguf import GgufInfo, read_gguf

PACKAGED = qap.packaged_model()
UPSTREAM = Path(__file__).parents[2] / "native" / "upstream"


def llava(path: Path, *, keys: list[files.Key] = LLAVA_KEYS, class_token: bool = True) -> Path:
    return build(path, keys, [CLASS_TOKEN, *LLAVA_TENSORS] if class_token else LLAVA_TENSORS)


def test_a_pair_that_fits(tmp_path: Path) -> None:
    own = qap.annotate(PACKAGED.mmproj, tmp_path / "own.gguf", qap.PruneConfig(n_keep=18, alpha="dynamic"))
    report = qap.check_files(own, PACKAGED.model)
    mmproj, model = report.files
    assert (mmproj.kind, mmproj.family, mmproj.name, mmproj.width, mmproj.n_tokens) == (
        "mmproj", "mlp", "tiny-llava", 256, 144,
    )  # fmt: skip
    assert (mmproj.semantics, mmproj.why_not_prunable, mmproj.error) == (("cls", "text", "attention"), None, None)
    assert mmproj.defaults == qap.PruneConfig(n_keep=18, alpha="dynamic")
    for file, path in ((mmproj, own), (model, PACKAGED.model)):
        assert sum(file.weights.values()) == sum(n_bytes for _, n_bytes in read_gguf(path).tensors.values())
        assert list(file.weights.values()) == sorted(file.weights.values(), reverse=True)
    assert (set(mmproj.weights), set(model.weights)) == ({"f16", "f32"}, {"q4_0", "q6_K", "f32"})
    assert (mmproj.memory, model.memory) == (_core.mmproj_bytes(str(own)), None)
    assert (dict(mmproj.image), dict(model.image)) == ({"image_size": 192, "patch_size": 16}, {})
    assert (model.kind, model.family, model.width, model.error) == ("language model", "paddleocr", 256, None)
    assert [warning.fixed for warning in model.warnings] == [True]
    (pair,) = report.pairs
    assert (pair.fits, pair.reason, pair.positions, report.ok) == (True, None, ("compact", "keep"), True)
    assert not pair.relabel
    assert json.loads(json.dumps(report.to_dict()))["files"][0]["defaults"]["n_keep"] == 18


def test_widths_that_differ_do_not_fit(tmp_path: Path) -> None:
    other = llava(tmp_path / "other.gguf")
    report = qap.check_files(other, PACKAGED.mmproj, PACKAGED.model)
    assert [(pair.mmproj, pair.fits) for pair in report.pairs] == [(other, False), (PACKAGED.mmproj, True)]
    assert report.pairs[0].reason is not None
    assert "gives 12 floats a token, the language model takes 256" in report.pairs[0].reason
    assert not report.ok


def test_positions_may_have_gaps_with_m_rope_only(plain_model: Path) -> None:
    report = qap.check_files(PACKAGED.mmproj, plain_model)
    (pair,) = report.pairs
    assert (report.files[1].family, report.files[1].warnings) == ("llama", ())
    assert (pair.positions, pair.relabel) == (("compact",), True)


def test_signals_are_those_of_the_encoder(tmp_path: Path) -> None:
    plain = llava(tmp_path / "plain.gguf", class_token=False)
    tower = llava(tmp_path / "tower.gguf", keys=[*LLAVA_KEYS, ("qap_clip_text.version", files.u32(1))])
    none, all_four = qap.check_files(plain, tower).files
    assert none.semantics == ("text", "attention")
    assert all_four.semantics == ("clip_text", "cls", "text", "attention")


def info(*tensors: str, **keys: Any) -> GgufInfo:
    metadata = {"clip.vision." + key: value for key, value in keys.items()}
    return GgufInfo(Path("x.gguf"), metadata, dict.fromkeys(tensors, ("f32", 4)))


CLASS, LAYER = "v.class_embd", {"feature_layer": None}


@pytest.mark.parametrize(
    ("header", "projector", "expected"),
    [
        (info(CLASS, **LAYER), "mlp", [(25814, True)]),
        (info(CLASS), "mlp", [(25814, True), (25817, True)]),
        (info(CLASS), "ldp", [(25814, True), (25817, True)]),
        (info(**LAYER), "mlp", []),
        (info(), "mlp", [(None, False)]),
        (info(CLASS, image_grid_pinpoints=None, **LAYER), "mlp", [(25814, True), (None, False)]),
        (info("v.image_newline", **LAYER), "mlp", [(None, False)]),
        (info("v.image_newline", image_grid_pinpoints=None, **LAYER), "mlp", [(None, True)]),
        (info("model.image_newline", image_grid_pinpoints=None, **LAYER), "mlp", [(None, True)]),
        (info("model.image_newline", image_grid_pinpoints=None, **LAYER), "ldp", [(None, False)]),
        (info(), "idefics3", []),
        (info(CLASS), "some_new_one", []),
    ],
)
def test_warnings_of_llava(header: GgufInfo, projector: str, expected: list[tuple[int | None, bool]]) -> None:
    assert [(defect.issue, defect.fixed) for defect in find_defects(header, projector)] == expected


@pytest.mark.parametrize(
    ("header", "projector", "words"),
    [
        (info(CLASS), "internvl", "predecessor's position"),
        (info(CLASS), "cogvlm", "not measured"),
        (info(CLASS), "llama4", "transposed"),
        (info(), "pixtral", "NaN"),
        (info(), "qwen2.5vl_merger", "padded with black"),
        (info(), "gemma3", "padded with black"),
    ],
)
def test_warnings_of_other_families(header: GgufInfo, projector: str, words: str) -> None:
    assert [defect.text for defect in find_defects(header, projector) if words in defect.text]
    assert not [defect for defect in find_defects(info(), "internvl") if words in defect.text]


def test_what_is_said_to_be_mended_has_a_patch() -> None:
    named = {defect.patch for defect in (RELABELLED, *(row for _, row in _TABLE)) if defect.patch is not None}
    assert named <= {path.name for path in UPSTREAM.glob("*.patch")}


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ({"qap.version": files.u32(2)}, "qap.version must be 1"),
        ({"qap.version": files.u32(1), "qap.colour": files.u32(2)}, "qap.colour"),
        ({"qap.version": files.u32(1), "qap.semantic": files.text("clip_text")}, "gives cls, text, attention"),
    ],
)
def test_defaults_that_cannot_be(tmp_path: Path, prune: dict[str, bytes], words: str) -> None:
    path = llava(tmp_path / "a.gguf", keys=[*LLAVA_KEYS, *prune.items()])
    report = qap.check_files(path)
    assert not report.ok
    assert words in (report.files[0].error or "")
    assert "\n" not in (report.files[0].error or "")


def test_defaults_of_a_model_that_cannot_be_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = qap.annotate(llava(tmp_path / "a.gguf"), tmp_path / "b.gguf", qap.PruneConfig(n_keep=3))
    real = _core.inspect_mmproj
    monkeypatch.setattr(_core, "inspect_mmproj", lambda *a: real(*a) | {"why_not": "it is of another family"})
    (report,) = qap.check_files(path).files
    assert report.semantics == ()
    assert report.error is not None
    assert "its qap.* keys ask for pruning, but it is of another family; change them with --annotate" in report.error
    with pytest.raises(qap.UnsupportedError, match="it is of another family"):
        qap.annotate(path, tmp_path / "c.gguf", qap.PruneConfig())
    assert qap.annotate(path, tmp_path / "c.gguf", None).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "c.gguf"]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    layers = llava(tmp_path / "layers.gguf", keys=with_key("clip.vision.block_count", files.u32(9)))
    odd = build(tmp_path / "odd.gguf", [("general.architecture", files.text("odd\n"))], [CLASS_TOKEN])
    report = qap.check_files(text, tmp_path / "none.gguf", layers, odd, PACKAGED.model)
    assert [file.kind for file in report.files] == ["unreadable"] * 2 + ["mmproj"] + ["language model"] * 2
    said = ["another kind", "cannot open", "found none", "context_length"]
    for file, words in zip(report.files, said, strict=False):
        assert words in (file.error or ""), file
        assert "\n" not in (file.error or "")
    assert report.files[2].warnings  # said although it cannot be loaded
    (pair,) = report.pairs
    assert (pair.fits, pair.reason) == (False, "the mmproj cannot be loaded")
    with pytest.raises(ConvertError, match="at least one GGUF file"):
        qap.check_files()


def test_nothing_is_printed_and_logs_come_back(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import llama_cpp

    qap.check_files(llava(tmp_path / "a.gguf"), PACKAGED.model, PACKAGED.mmproj)
    assert capfd.readouterr() == ("", "")
    from llama_cpp import _logger

    _logger.set_verbose(True)
    try:
        params = llama_cpp.llama_model_default_params()
        assert not llama_cpp.llama_model_load_from_file(str(tmp_path / "none").encode(), params)
    finally:
        _logger.set_verbose(False)
    assert "none" in capfd.readouterr().err
