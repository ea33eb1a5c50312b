"""Folders of pictures for the tests of batches. Needs `make programs` where a model answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf.errors import ConfigError
from qap_gguf.serve.child import find_program

QUESTION = "What is in row 1, column 2?"
#: Settings of a model for tests: all tokens, a small context, a thread.
SMALL: dict[str, Any] = {"prompt": QUESTION, "prune": None, "n_ctx": 512, "n_threads": 1, "parallel": 2}
_KINDS = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".PNG")
_SIDES = (192, 96, 240, 384)


@pytest.fixture
def program() -> None:
    """Skip where llama-server was not built."""
    try:
        find_program()
    except ConfigError as err:
        pytest.skip(str(err))


def make_pictures(folder: Path, n: int, n_damaged: int) -> None:
    """Pictures of mixed sizes and kinds, in folders too, `n_damaged` of them damaged in ways of their own."""
    order = random.Random(20261126)
    damaged = set(order.sample(range(n), n_damaged))
    with Image.open(qap.packaged_model().sample) as opened:
        sample = opened.convert("RGB")
    for number in range(n):
        path = folder / f"{number % 3}" / f"{number:03}{_KINDS[number % len(_KINDS)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        side, turn = _SIDES[number % len(_SIDES)], number % 5
        picture = sample.resize((side, side if turn else side * 2 // 3))
        if turn == 1:
            picture = picture.convert("L")
        elif turn == 2:
            picture.putpixel((0, 0), (number % 256, number // 256, 0))
        picture.save(path)
        if number in damaged:
            whole = path.read_bytes()
            path.write_bytes((b"", b"no picture", whole[: len(whole) // 3])[number % 3])
