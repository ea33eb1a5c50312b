"""Channel weights in an mmproj file: written by `annotate`, used by VisionModel and by stock users of libmtmd alike."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from convert.test_imatrix import write_gguf
from dropin.gguf_copy import rewrite
from native.features import F32
from ops.graphs import WatchedEncoder
from qap_gguf import reference
from qap_gguf.cli.main import main
from qap_gguf.config import WEIGHTS_KEY
from qap_gguf.convert import channel_weights
from qap_gguf.errors import ConfigError, ConvertError, UnsupportedError

PACKAGED = qap.packaged_model()
MODEL = qap.PruneConfig(n_keep=18, error="model", alpha=0.0, outlier_weight=0.0, select="topk")
LACKS = (
    r"expected .*channel weights.* for model, .*; write them with qap-gguf convert --annotate MMPROJ OUT --error model "
)
WEIGHTS = (np.random.default_rng(5).gamma(0.3, size=256) + 1e-3).astype(np.float32)


def stored(path: Path) -> F32 | None:
    field = gguf.GGUFReader(path).fields.get(WEIGHTS_KEY)
    return None if field is None else np.array(field.contents(), np.float32)


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "imatrix.gguf"
    return write_gguf(path, {"blk.0.attn_k.weight": WEIGHTS, "blk.0.ffn_up.weight": np.ones(256)}, [4.0])


@pytest.fixture(scope="module")
def weighted(imatrix: Path) -> Path:
    """The packaged mmproj with weights, its default error still int4."""
    return qap.annotate(PACKAGED.mmproj, imatrix.with_name("mmproj.gguf"), qap.PruneConfig(n_keep=36), imatrix=imatrix)


def test_they_go_into_the_file_and_stay_there(imatrix: Path, weighted: Path, tmp_path: Path) -> None:
    np.testing.assert_allclose(channel_weights(imatrix), WEIGHTS, rtol=1e-6)
    again = qap.annotate(weighted, tmp_path / "a.gguf", qap.PruneConfig(error="model"))
    for path in (weighted, again):
        np.testing.assert_array_equal(stored(path), channel_weights(imatrix))
    bare = qap.annotate(again, tmp_path / "b.gguf", None)
    assert bare.read_bytes() == PACKAGED.mmproj.read_bytes()
    assert main(["convert", "--check", str(again), str(PACKAGED.model)]) == 0


def test_a_vision_model_scores_by_them(weighted: Path) -> None:
    with qap.VisionModel(weighted, PACKAGED.model, n_threads=1) as vlm:
        assert vlm.file_config == qap.PruneConfig(n_keep=36)
        image = vlm.encode(PACKAGED.sample)
        kept, scores = vlm.prune(image, MODEL).indices, vlm.score(image, MODEL)
        plain = vlm.prune(image, MODEL.replace(error="int4")).indices
    truth = reference.quantization_error(image.tokens, "model", 128, WEIGHTS)
    np.testing.assert_allclose(scores.error, truth, rtol=1e-5)
    assert kept.tolist() == sorted(np.argsort(-scores.total, kind="stable")[:18].tolist())
    assert kept.tolist() != plain.tolist()  # these weights change the choice


def test_stock_users_get_the_same_rows_encoded_or_recalled(weighted: Path) -> None:
    with qap.VisionModel(weighted, PACKAGED.model, n_threads=1) as vlm:
        want = vlm.prune(vlm.encode(PACKAGED.sample), MODEL)
    encoder = WatchedEncoder(weighted)
    try:
        with qap.use(MODEL):
            rows, nodes = encoder.encode(PACKAGED.sample)
        with qap.use(MODEL.replace(error="int4")):
            encoder.encode(PACKAGED.sample, recall=True)
        with qap.use(MODEL):
            recalled, few = encoder.encode(PACKAGED.sample, recall=True)
    finally:
        encoder.close()
    assert len(few) < len(nodes) / 2  # pruned anew, not encoded again
    np.testing.assert_allclose(rows, want.features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(recalled, want.features, rtol=1e-4, atol=1e-4)


def test_a_file_without_them_is_one_line_that_says_how_to_get_them(tmp_path: Path) -> None:
    with qap.VisionModel(n_threads=1) as vlm:
        image = vlm.encode(PACKAGED.sample)
        for act in (vlm.prune, vlm.score):
            with pytest.raises(UnsupportedError, match=LACKS) as caught:
                act(image, MODEL)
            assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedError, match=LACKS):
        qap.annotate(PACKAGED.mmproj, tmp_path / "a.gguf", MODEL)
    encoder = WatchedEncoder()
    try:
        with qap.use(MODEL), pytest.raises(AssertionError):
            encoder.encode(PACKAGED.sample)
    finally:
        encoder.close()


def test_an_early_drop_needs_none(weighted: Path) -> None:
    """Channels inside the encoder are the encoder's own: there the error is that of int4."""
    early = MODEL.replace(encoder_keep=0.5)
    with qap.VisionModel(weighted, PACKAGED.model, n_threads=1) as vlm:
        image = vlm.encode(PACKAGED.sample, early)
        plain = vlm.encode(PACKAGED.sample, early.replace(error="int4"))
        assert len(vlm.prune(image, early).indices) == 18
    np.testing.assert_array_equal(image.kept_early, plain.kept_early)


def test_an_imatrix_that_does_not_fit_is_refused(
    imatrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = write_gguf(tmp_path / "narrow.gguf", {"blk.0.attn_q.weight": np.ones(64)}, [4.0])
    with pytest.raises(ConvertError, match=r"tokens have 256 channels, got 64 in .*narrow"):
        qap.annotate(PACKAGED.mmproj, tmp_path / "a.gguf", MODEL, imatrix=narrow)
    later = write_gguf(tmp_path / "later.gguf", {"blk.1.attn_q.weight": np.ones(256)}, [4.0])
    with pytest.raises(ConvertError, match="the first layer's attention"):
        channel_weights(later)
    zeros = write_gguf(tmp_path / "zeros.gguf", {"blk.0.attn_q.weight": np.zeros(256)}, [4.0])
    with pytest.raises(ConvertError, match="numbers above 0"):
        channel_weights(zeros)
    few = rewrite(PACKAGED.mmproj, tmp_path / "few.gguf", {"qap.version": 1, WEIGHTS_KEY: [1.0, 2.0]})
    assert main(["convert", "--check", str(few)]) == 1
    assert "each of the 256 channels of a token, got 2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="expected defaults beside it"):
        qap.annotate(PACKAGED.mmproj, tmp_path / "a.gguf", None, imatrix=imatrix)
    assert not (tmp_path / "a.gguf").exists()


def test_the_command_writes_them(imatrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, words = tmp_path / "a.gguf", ["--imatrix", str(imatrix)]
    assert main(["convert", "--annotate", str(PACKAGED.mmproj), str(out), *words, "--error", "model"]) == 0
    np.testing.assert_array_equal(stored(out), channel_weights(imatrix))
    assert main(["convert", "--annotate", str(PACKAGED.mmproj), str(out), *words]) == 2
    assert "give that or another default too" in " ".join(capsys.readouterr().err.split())


def test_a_conversion_stores_them(plain_llava: Path, tmp_path: Path) -> None:
    weights = np.linspace(0.0, 2.0, 64, dtype=np.float32)
    path = write_gguf(tmp_path / "x.gguf", {"blk.0.attn_q.weight": weights}, [5.0])
    config = qap.PruneConfig(error="model")
    made = qap.convert(plain_llava, tmp_path / "m", quantize="Q4_0", name="t", prune=config, imatrix=path)
    np.testing.assert_array_equal(stored(made.mmproj), channel_weights(path))
    for imatrix in (None, lambda model, mmproj: path):
        with pytest.raises(ConvertError, match="expected an imatrix that is there already for model"):
            qap.convert(plain_llava, tmp_path / "n", quantize="Q4_0", name="t", prune=config, imatrix=imatrix)
