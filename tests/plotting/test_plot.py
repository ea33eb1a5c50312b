"""The picture of what was kept: where patches lie (the encoder is the judge), what is dimmed, and what is drawn."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from PIL import Image

import qap_gguf as qap
from qap_gguf.errors import ArrayError, ConfigError, ImageError, UnsupportedError
from qap_gguf.plotting.plot import _headline, plot
from qap_gguf.plotting.sheet import sheet
from qap_gguf.vision.images import Pixels, load_image
from qap_gguf.vision.overlay import PAD_COLOUR, Box, dim_dropped, edges, kept_map, letterbox, place
from qap_gguf.vision.tiles import Content

SIDE, GRID = 192, (12, 12)
CFG = qap.PruneConfig(n_keep=36)


@pytest.fixture(scope="module")
def vlm() -> Iterator[qap.VisionModel]:
    with qap.VisionModel() as model:
        yield model


@pytest.fixture(scope="module")
def sample() -> Pixels:
    return load_image(qap.packaged_model().sample)


def picture(width: int, height: int) -> Pixels:
    """Noise with a gradient: nothing in it repeats, so a shifted copy is another picture."""
    noise = np.random.default_rng(width).integers(0, 120, (height, width, 3))
    return (noise + np.linspace(0, 135, width)[None, :, None]).astype(np.uint8)


def nmse(x: Any, y: Any) -> float:
    return float(((x - y) ** 2).sum() / (x**2).sum())


def synthetic(
    grid: tuple[int, int], size: tuple[int, int], seed: int = 0
) -> tuple[Pixels, qap.ImageEmbedding, qap.Scores]:
    rng = np.random.default_rng(seed)
    n = grid[0] * grid[1]
    x = rng.standard_normal((n, 32)).astype(np.float32)
    image = qap.ImageEmbedding(x, grid, None, size, 0.0)
    return picture(*size), image, qap.score(x, CFG, rng.random(n).astype(np.float32))


# --- where patches lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "box"),
    [
        ((0.0, 3.0, 24.0, 18.0), Box(0, 42, 336, 252)),
        ((3.0, 0.0, 18.0, 24.0), Box(42, 0, 252, 336)),
        ((0.0, 0.0, 10.5, 24.0), Box(0, 0, 147, 336)),
        ((0.0, 11.95, 24.0, 0.01), Box(0, 167, 336, 1)),
        ((0.0, 0.0, 24.5, 24.5), Box(0, 0, 343, 343)),
        (None, Box(0, 0, 336, 336)),
    ],
)
def test_the_place_on_a_drawing(content: Content | None, box: Box) -> None:
    assert place(content, (24, 24), (336, 336)) == box


@pytest.mark.parametrize("size", [(192, 110), (77, 192), (500, 333), (301, 640), (40, 30), (192, 192)])
def test_a_letterboxed_picture_is_what_the_encoder_sees(vlm: qap.VisionModel, size: tuple[int, int]) -> None:
    pixels = picture(*size)
    image = vlm.encode(pixels)
    features, box = image.features, place(image.content, GRID, (SIDE, SIDE))
    seen = letterbox(pixels, (SIDE, SIDE), box)
    assert SIDE in (box.width, box.height)
    assert abs(2 * box.left + box.width - SIDE) <= 1
    assert seen.shape == (SIDE, SIDE, 3)
    # mostly the same to the bit; Pillow and upstream may round a byte differently
    assert nmse(features, vlm.encode(seen).features) <= 2e-5
    assert nmse(features, vlm.encode(np.roll(seen, 1, axis=0)).features) > 1e-3  # one pixel off is noticed


def test_padding_has_the_encoders_colour() -> None:
    seen = letterbox(picture(60, 30), (120, 120), Box(0, 30, 120, 60))
    assert (seen[:30] == PAD_COLOUR).all()
    assert (seen[90:] == PAD_COLOUR).all()
    assert (seen[30:90] == PAD_COLOUR).all(axis=-1).mean() < 0.01


@pytest.mark.parametrize("token", [0, 11, 12, 65, 77, 132, 143])
def test_a_painted_patch_changes_its_own_token_most(vlm: qap.VisionModel, sample: Pixels, token: int) -> None:
    row, column = divmod(token, GRID[1])
    painted = sample.copy()
    patch = painted[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
    patch[:] = 255 - patch
    change = np.linalg.norm(vlm.encode(painted).features - vlm.encode(sample).features, axis=1)
    assert int(change.argmax()) == token


# --- what is dimmed ---------------------------------------------------------------------------------------------------


def test_kept_patches_are_unchanged_and_dropped_ones_grey_and_darker() -> None:
    canvas = letterbox(picture(400, 300), (12 * 7, 12 * 7), Box(0, 10, 84, 63))
    kept = [0, 13, 50, 77, 143]
    seen = dim_dropped(canvas, GRID, kept)
    for token in range(144):
        row, column = divmod(token, 12)
        inside = (slice(row * 7, row * 7 + 7), slice(column * 7, column * 7 + 7))
        if token in kept:
            assert (seen[inside] == canvas[inside]).all()
            continue
        assert (seen[inside] == seen[inside][..., :1]).all()
        centre = (row * 7 + 3, column * 7 + 3)
        assert seen[centre].sum() < 0.75 * canvas[centre].sum()
    assert not np.shares_memory(seen, canvas)


def test_white_and_black_stay_apart_when_dimmed() -> None:
    white, black = np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)
    assert dim_dropped(white, (1, 2), [1])[0, 0, 0] < 128
    assert dim_dropped(white, (1, 2), [1])[0, 0, 0] > dim_dropped(black, (1, 2), [1])[0, 0, 0]


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_outlines_run_between_kept_and_dropped(rows: int, columns: int, data: st.DataObject) -> None:
    kept = kept_map((rows, columns), data.draw(st.lists(st.integers(0, rows * columns - 1), min_size=1)))
    expected = set()
    for y, x in np.argwhere(kept).tolist():
        sides = {
            (y - 1, x): ((x, y), (x + 1, y)), (y + 1, x): ((x, y + 1), (x + 1, y + 1)),
            (y, x - 1): ((x, y), (x, y + 1)), (y, x + 1): ((x + 1, y), (x + 1, y + 1)),
        }  # fmt: skip
        for (r, c), side in sides.items():
            if not (0 <= r < rows and 0 <= c < columns and kept[r, c]):
                expected.add(side)
    found = edges(kept)
    assert len(found) == len(set(found))
    assert set(found) == expected


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.fixture
def drawable() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")


@pytest.mark.usefixtures("drawable")
def test_the_page_shows_the_dimmed_picture_and_depends_on_what_was_kept(vlm: qap.VisionModel, sample: Pixels) -> None:
    image = vlm.encode(sample)
    cut = vlm.prune(image, CFG)
    page = plot(sample, image, cut.scores, cut.indices, cfg=CFG)
    assert (page.mode, page.size[0]) == ("RGB", 1600)
    assert 700 < page.size[1] < 1000
    again = plot(qap.packaged_model().sample, image, cut.scores, cut.indices.tolist(), cfg=CFG)
    assert page.tobytes() == again.tobytes()
    others = [*cut.indices[:-1].tolist(), 0]
    assert plot(sample, image, cut.scores, others, cfg=CFG).tobytes() != page.tobytes()

    side = 55  # pixels of a patch on a page of 1600, and where the picture starts
    pixels = np.asarray(page)[142 : 142 + 12 * side, 64 : 64 + 12 * side]
    whole = (12 * side, 12 * side)
    expected = dim_dropped(letterbox(sample, whole, Box(0, 0, *whole)), GRID, cut.indices)
    inner = (np.arange(12 * side) % side > 4) & (np.arange(12 * side) % side < side - 4)  # the outlines apart
    np.testing.assert_array_equal(pixels[np.ix_(inner, inner)], expected[np.ix_(inner, inner)])


@pytest.mark.usefixtures("drawable")
@pytest.mark.parametrize("width", [800, 1400, 2400])
def test_the_page_is_as_wide_as_asked_for(width: int) -> None:
    pixels, image, scores = synthetic((24, 24), (400, 300))
    page = plot(pixels, image, scores, [0, 575], width=width)
    assert page.size[0] == width
    assert 0.45 < page.size[1] / width < 0.65


@pytest.mark.usefixtures("drawable")
@pytest.mark.parametrize("grid", [(1, 1), (30, 10), (6, 40), (2, 1), (64, 64)])
def test_any_grid_is_drawn(grid: tuple[int, int]) -> None:
    pixels, image, scores = synthetic(grid, (grid[1] * 20, grid[0] * 20))
    page = plot(pixels, image, scores, [0])
    assert page.size[0] == 1600
    assert page.size[1] < 1600
    corners = np.asarray(page)[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all()


@pytest.mark.usefixtures("drawable")
def test_no_signal_is_said_and_constant_scores_are_drawn() -> None:
    pixels, image, scores = synthetic(GRID, (96, 96))
    zeros = np.zeros(144, np.float32)

    def grey(page: Image.Image) -> int:
        return int((np.asarray(page) == 0xEF).all(axis=-1).sum())

    assert grey(plot(pixels, image, scores, [1, 2])) < 1000
    assert grey(plot(pixels, image, dataclasses.replace(scores, semantic=zeros), [1, 2])) > 50_000
    plot(pixels, image, dataclasses.replace(scores, error=zeros, outlier=zeros + 3, total=zeros), [1, 2])


@pytest.mark.usefixtures("drawable")
@pytest.mark.parametrize("title", ["$x_1^$ \\frac", "two\nlines", "\u65e5\u672c\u8a9e", "\udcff", "x" * 500, " "])
def test_a_title_may_hold_anything(title: str) -> None:
    pixels, image, scores = synthetic((3, 3), (30, 30))
    assert plot(pixels, image, scores, [0], title=title).size == plot(pixels, image, scores, [0]).size


def test_the_header_says_what_was_done() -> None:
    _, _, scores = synthetic((4, 4), (40, 40))
    assert _headline(4, 16, scores, None) == ("4 of 16 image tokens kept (25.0 %)", "K = 4   alpha = 0.7")
    _, method = _headline(4, 16, dataclasses.replace(scores, alpha=0.5123), qap.PruneConfig(alpha="dynamic", n_keep=4))
    assert "K = 4   select = coverage   alpha = 0.512 (dynamic)   error = int4 in groups of 128" in method


@pytest.mark.usefixtures("drawable")
def test_drawing_leaves_matplotlib_as_it_was() -> None:
    code = """
import sys, matplotlib, numpy as np, qap_gguf as qap
from qap_gguf.plotting.plot import plot
matplotlib.rcParams["font.size"] = 31
before = {k: v for k, v in dict.items(matplotlib.rcParams) if k != "backend"}
x = np.random.default_rng(0).standard_normal((4, 8)).astype("f4")
image = qap.ImageEmbedding(x, (2, 2), None, (8, 8), 0.0)
plot(np.zeros((8, 8, 3), "u1"), image, qap.score(x), [0])
assert {k: v for k, v in dict.items(matplotlib.rcParams) if k != "backend"} == before
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawable")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"width": 100}, ConfigError, "width"),
        ({"width": True}, ConfigError, "width"),
        ({"indices": []}, ArrayError, "indices"),
        ({"indices": [0.5]}, ArrayError, "indices"),
        ({"indices": [3, 3]}, ArrayError, "at most once"),
        ({"indices": [-1]}, ArrayError, "0..15"),
        ({"indices": [16]}, ArrayError, "0..15"),
        ({"picture": np.zeros((40, 41, 3), np.uint8)}, ImageError, "40 x 40"),
        ({"picture": "nowhere.png"}, ImageError, "nowhere.png"),
        ({"scores": synthetic((3, 3), (9, 9))[2]}, ArrayError, "scores.error"),
        ({"image": synthetic((1, 16), (40, 40))[1]}, UnsupportedError, "1 x 16"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(change: dict[str, Any], error: type[Exception], words: str) -> None:
    pixels, image, scores = synthetic((4, 4), (40, 40))
    words_of: dict[str, Any] = {"picture": pixels, "image": image, "scores": scores, "indices": [0]} | change
    with pytest.raises(error, match=words) as caught:
        plot(**words_of)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("drawable")
def test_tiles_are_not_drawn_as_one_line() -> None:
    pixels, image, _ = synthetic((1, 16), (40, 40))
    with pytest.raises(UnsupportedError, match="got 1 x 16 for 16 tokens"):
        sheet(pixels, image, [(None, "all")])


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    pixels, image, scores = synthetic((4, 4), (40, 40))
    with pytest.raises(UnsupportedError, match=r"pip install matplotlib") as caught:
        plot(pixels, image, scores, [0])
    assert "\n" not in str(caught.value)


def test_what_was_dropped_early_is_the_darkest(vlm: qap.VisionModel, sample: Pixels) -> None:
    half = CFG.replace(encoder_keep=0.5)
    image = vlm.encode(sample, half)
    cut = vlm.prune(image, half)
    assert image.kept_early is not None
    late = np.setdiff1d(image.kept_early, cut.indices)
    assert (len(cut.indices), len(late), int(image.dropped.sum())) == (36, 36, 72)
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    shown = dim_dropped(white, GRID, cut.indices, image.padding, image.dropped)
    cell = SIDE // GRID[0]
    tokens = shown[::cell, ::cell, 0].ravel()
    assert set(tokens[cut.indices]) == {255}
    assert len(set(tokens[late])) == len(set(tokens[image.dropped])) == 1
    assert tokens[image.dropped][0] < tokens[late][0] < 255
    drawn = plot(sample, image, cut.scores, cut.indices, cfg=half)
    assert drawn.size[0] == 1600
    plain = vlm.prune(vlm.encode(sample), CFG)
    other = plot(sample, vlm.encode(sample), plain.scores, plain.indices, cfg=CFG)
    assert not np.array_equal(np.asarray(drawn), np.asarray(other))
    assert cut._repr_png_() != vlm.prune(image, half.replace(n_keep=35))._repr_png_()
