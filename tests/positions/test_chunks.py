"""Chunks of libmtmd around a relabelled language model: counts, positions, saved bytes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

import qap_gguf as qap
from dropin.probe import Mtmd

FILES = qap.packaged_model()


@pytest.fixture(scope="module")
def mtmd() -> Mtmd:
    return Mtmd(str(FILES.mmproj), str(FILES.model), flash=False)


def test_a_dense_picture_counts_like_text(mtmd: Mtmd, monkeypatch: pytest.MonkeyPatch) -> None:
    want = {"n_tokens": [144, 144], "n_pos": [144, 144], "positions": list(range(7, 151))}
    for switch in ("0", "1"):  # the file is made for it: not what QAP_DISABLE turns off
        monkeypatch.setenv("QAP_DISABLE", switch)
        (chunk,) = mtmd.tokenize(str(FILES.sample))
        assert mtmd.describe(chunk) == want


@pytest.mark.parametrize("positions", ["auto", "keep", "compact"])
def test_a_pruned_picture_takes_the_positions_of_the_whole(mtmd: Mtmd, positions: str) -> None:
    with qap.use(qap.PruneConfig(n_keep=18, positions=positions)):
        (chunk,) = mtmd.tokenize(str(FILES.sample))
    n_pos = 18 if positions == "compact" else 144
    before = mtmd.describe(chunk)
    assert (before["n_tokens"], before["n_pos"]) == ([18, 18], [n_pos, n_pos])  # known before the encode
    rows = mtmd.embeddings(chunk)
    found = mtmd.describe(chunk)
    assert found["n_pos"] == [n_pos, n_pos]
    assert len(set(found["positions"])) == len(rows) == 18
    assert (found["positions"] == list(range(7, 25))) is (positions == "compact")
    assert max(found["positions"]) < 7 + n_pos

    lib, saved = mtmd.lib, mtmd.save(chunk)
    loaded = lib.mtmd_input_chunk_load(saved, len(saved))
    assert mtmd.describe(loaded) == found
    assert mtmd.save(loaded) == saved
    past = ctypes.c_int32()
    status = lib.mtmd_helper_decode_image_chunk(
        mtmd.ctx, mtmd.llama._ctx.ctx, loaded, rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), 0, 0, 512,
        ctypes.byref(past), lib.mtmd_helper_post_decode_callback(), None,
    )  # fmt: skip
    assert (status, past.value, mtmd.cells()) == (0, n_pos, max(found["positions"]) - 7 + 1)
    mtmd.llama._ctx.kv_cache_clear()  # type: ignore[no-untyped-call]


def test_keys_of_the_file_that_ask_for_keep(tmp_path: Path, plain_model: Path) -> None:
    """An mmproj whose defaults keep positions is an error with the plain language model, in one line with the cure."""
    keyed = qap.annotate(FILES.mmproj, tmp_path / "keyed.gguf", qap.PruneConfig(n_keep=18, positions="keep"))
    with qap.VisionModel(keyed, plain_model, n_threads=1) as vlm:
        image, config = vlm.encode(FILES.sample), vlm.file_config
        with pytest.raises(qap.UnsupportedError, match="relabel its file with qap-gguf convert --keep-positions"):
            vlm.generate([image, "?"], prune=config)
    mtmd = Mtmd(str(keyed), str(FILES.model), flash=False)
    (chunk,) = mtmd.tokenize(str(FILES.sample))
    assert mtmd.describe(chunk)["n_pos"] == [144, 144]
    assert mtmd.describe(chunk)["n_tokens"] == [18, 18]


def test_an_early_drop_moves_no_token(mtmd: Mtmd) -> None:
    """What is left after it keeps its index among all rows, before and after saving."""
    cfg = qap.PruneConfig(n_keep=18, encoder_keep=0.25, positions="keep")
    with qap.use(cfg):
        (chunk,) = mtmd.tokenize(str(FILES.sample))
    rows = mtmd.embeddings(chunk)
    found = mtmd.describe(chunk)
    with qap.VisionModel(n_threads=1, flash_attn=False) as vlm:
        image = vlm.encode(FILES.sample, cfg)
        indices = vlm.prune(image, cfg.replace(positions="compact")).indices
    assert image.kept_early is not None
    assert len(image.kept_early) == 36
    assert max(indices) > 36  # not numbers among what is left
    assert found["positions"] == [7 + i for i in indices.tolist()]
    assert (found["n_tokens"], found["n_pos"], len(rows)) == ([18, 18], [144, 144], 18)
    saved = mtmd.save(chunk)
    loaded = mtmd.lib.mtmd_input_chunk_load(saved, len(saved))
    assert mtmd.describe(loaded) == found
    assert mtmd.save(loaded) == saved
