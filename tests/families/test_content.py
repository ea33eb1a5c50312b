"""Where a picture lies on what the encoder sees, for every projector that is pruned: the encoder is the judge.

A canvas that is drawn by the place that the library tells (overlay.py) must give the tokens that the picture itself
gave; drawn at another place it must not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from mutate import with_axes
from qap_gguf.vision.overlay import PAD_COLOUR, Box, letterbox, place
from tiny_mmproj import PROJECTORS, UNCOMPARED, tiny_mmproj, tiny_uncompared

SIZE = (60, 52)  # of a picture that none of them cuts into tiles
PATCH, CELL = 8, 16  # pixels of a side of what becomes a token, but for:
CELLS = {"minicpmv4_6": 32, "janus_pro": 8} | {name: side // lines for name, (side, lines) in UNCOMPARED.items()}
#: always several views, which have no place on one grid
VIEWS = {"idefics3", "granite4_vision"}
FIRST = {"kimivl", "kimik25", "llama4", "glm5v"}  # at the top left, as trained
PADDING = {"cogvlm": PAD_COLOUR, "janus_pro": (127, 127, 127)}
Pixels = npt.NDArray[np.uint8]
Named = tuple[str, qap.VisionModel]


def smooth(width: int, height: int) -> Pixels:
    """Noise without fine detail: where it lies matters, which filter made it larger does not."""
    noise = np.random.default_rng(11).integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def drawn(name: str, pixels: Pixels, canvas: tuple[int, int], box: Box) -> Pixels:
    """What the encoder sees: the picture in the box, and the padding's colour around it."""
    seen = letterbox(pixels, canvas, box)
    page = np.full(seen.shape, PADDING.get(name, (0, 0, 0)), np.uint8)
    inside = np.s_[box.top : box.top + box.height, box.left : box.left + box.width]
    page[inside] = seen[inside]
    return page


@pytest.fixture(scope="module", params=[name for name in [*PROJECTORS, *UNCOMPARED] if name not in VIEWS])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    folder = tmp_path_factory.mktemp(request.param)
    mmproj, language = folder / "mmproj.gguf", qap.packaged_model().model
    make = tiny_mmproj if request.param in PROJECTORS else tiny_uncompared
    mmproj.write_bytes(make(request.param))
    if request.param == "hunyuanvl":
        language = with_axes(language, folder / "axes.gguf")
    with qap.VisionModel(mmproj, language, n_ctx=256, n_threads=1, force_family=request.param in UNCOMPARED) as vlm:
        yield request.param, vlm


@pytest.mark.filterwarnings("ignore:this family was not compared")
def test_the_canvas_that_is_drawn_is_the_one_that_was_encoded(model: Named) -> None:
    name, vlm = model
    pixels = smooth(*SIZE)
    image = vlm.encode(pixels)
    (piece,) = image.pieces
    assert piece.content is not None
    cell = CELLS.get(name, CELL)
    canvas = (image.grid[1] * cell, image.grid[0] * cell)
    box = place(image.content, image.grid, canvas)
    assert vlm.prune(image, qap.PruneConfig(n_keep=2)).content == image.content

    def nmse(where: Box) -> float:
        again = vlm.encode(drawn(name, pixels, canvas, where))
        assert again.grid == image.grid
        return float(((again.tokens - image.tokens) ** 2).sum() / (image.tokens**2).sum())

    right = nmse(box)
    wrong = [nmse(box._replace(left=box.left + 3, width=box.width - 3)), nmse(box._replace(height=box.height - 3))]
    assert right * 20 < min(wrong), (box, right, wrong)
    if name in FIRST:
        assert box[:2] == (0, 0)
        assert box[2:] != canvas
