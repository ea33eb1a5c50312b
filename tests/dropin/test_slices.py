"""An image that the model cuts into slices shares its K among them in proportion to their tokens.

The packaged mmproj gets the keys of LLaVA-NeXT's tiling, so that it makes an overview and tiles, 144 tokens each.
How upstream orders and packs them is not looked at here (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

import qap_gguf as qap
from dropin.gguf_copy import rewrite
from qap_gguf import _core
from qap_gguf.config import PruneConfig

N = 144


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qap.VisionModel]:
    mmproj = rewrite(
        qap.packaged_model().mmproj,
        tmp_path_factory.mktemp("tiled") / "mmproj.gguf",
        {
            "clip.vision.mm_patch_merge_type": "spatial_unpad",
            "clip.vision.image_grid_pinpoints": [192, 384, 384, 192, 384, 384],
        },
    )
    with qap.VisionModel(mmproj, qap.packaged_model().model, n_threads=1) as vlm:
        yield vlm


def picture(width: int = 384, height: int = 384) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slices(vlm: qap.VisionModel, cfg: PruneConfig | None) -> list[_core.Chunk]:
    native = vlm._encoder._native
    with qap.use(cfg):
        chunks = native.tokenize(_core.media_marker(), [picture()], False, True)
    return [chunk for chunk in chunks if chunk.is_image]


def test_the_picture_is_cut(tiled: qap.VisionModel) -> None:
    assert [chunk.n_tokens for chunk in slices(tiled, None)] == [N] * 5


@pytest.mark.parametrize("n_keep", [5, 6, 7, 50, 52, 719, 720])
def test_slices_share_the_budget_exactly(tiled: qap.VisionModel, n_keep: int) -> None:
    counts = [chunk.n_tokens for chunk in slices(tiled, PruneConfig(n_keep=n_keep))]
    # equal sizes: equal shares, and what is left over goes to the first ones
    assert counts == [n_keep // 5 + (i < n_keep % 5) for i in range(5)]
    assert sum(counts) == n_keep


def test_a_ratio_counts_over_the_whole_image(tiled: qap.VisionModel) -> None:
    assert sum(chunk.n_tokens for chunk in slices(tiled, PruneConfig(keep_ratio=0.1))) == 72


def test_each_slice_is_encoded_to_its_share(tiled: qap.VisionModel) -> None:
    for chunk in slices(tiled, PruneConfig(n_keep=52)):
        rows = tiled._encoder._native.encode(chunk, False)
        report = chunk.report()
        assert report is not None
        assert rows.shape[0] == chunk.n_tokens == len(report["indices"])
        assert report["n_total"] == N


def test_with_fewer_tokens_than_slices_some_get_none(tiled: qap.VisionModel) -> None:
    chunks = slices(tiled, PruneConfig(n_keep=4))
    assert [chunk.n_tokens for chunk in chunks] == [1, 1, 1, 1, 0]
    assert [len(tiled._encoder._native.encode(chunk, False)) for chunk in chunks] == [1, 1, 1, 1, 0]
    assert [report["indices"].size for chunk in chunks if (report := chunk.report())] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(("positions", "n_pos"), [("compact", 0), ("keep", N)])
def test_a_slice_of_which_nothing_is_kept_is_prefilled_by_doing_nothing(
    tiled: qap.VisionModel, positions: str, n_pos: int
) -> None:
    """Upstream's helper, which stock handlers call, asserts on a chunk without tokens."""
    empty, native = slices(tiled, PruneConfig(n_keep=4, positions=positions))[-1], tiled._encoder._native
    rows, llama = native.encode(empty, False), tiled.language_model
    assert rows.shape == (0, native.n_embd)
    assert native.decode(int(llama._ctx.ctx), empty, rows, None, "auto", 7, 64) == 7 + n_pos


def test_n_keep_above_all_slices_keeps_all(tiled: qap.VisionModel) -> None:
    assert sum(chunk.n_tokens for chunk in slices(tiled, PruneConfig(n_keep=10**6))) == 5 * N


def test_vision_model_does_not_take_tiles_that_are_packed_as_never_trained(tiled: qap.VisionModel) -> None:
    with pytest.raises(qap.UnsupportedError, match=r"its 5 tiles .*no image_newline.*convert the checkpoint anew"):
        tiled.encode(picture())
    assert tiled.encode(picture(192, 192)).n_tokens == N
