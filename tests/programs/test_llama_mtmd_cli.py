"""llama-mtmd-cli prunes by its environment; each library is in its process once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qap_gguf as qap
from dropin.gguf_copy import rewrite
from programs.conftest import program


def run(*, mmproj: Path | None = None, image: Path | None = None, env: dict[str, str]) -> tuple[str, str]:
    """(answer, log) of one question about the packaged picture, or another with another encoder."""
    files = qap.packaged_model()
    words: list[Any] = ["-m", files.model, "--mmproj", mmproj or files.mmproj, "--image", image or files.sample]
    words += ["-p", "What is in row 2, column 4?"]
    done = subprocess.run(
        [program("llama-mtmd-cli"), *map(str, words), "--threads", "1", "-n", "8", "--temp", "0", "-lv", "4"],
        env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("env", "n_image"), [({}, 144), ({"QAP_KEEP_RATIO": "0.125"}, 18)])
def test_it_prunes_by_its_environment(env: dict[str, str], n_image: int) -> None:
    said, log = run(env=env)
    assert "boat" in said
    assert n_prompt(log) == n_image + 20


def n_prompt(log: str) -> int:
    """Tokens of the prompt."""
    found = re.search(r"prompt eval time.*?/\s*(\d+) tokens", log)
    assert found is not None
    return int(found[1])


def test_tiles_of_which_nothing_is_kept(tmp_path: Path) -> None:
    """Four tiles and an overview: two tokens for all of them, and four blank tiles."""
    keys: dict[str, Any] = {
        "clip.vision.mm_patch_merge_type": "spatial_unpad",
        "clip.vision.image_grid_pinpoints": [384, 384],
    }
    mmproj = rewrite(qap.packaged_model().mmproj, tmp_path / "mmproj.gguf", keys)
    blank = tmp_path / "blank.png"
    Image.fromarray(np.full((384, 384, 3), 240, np.uint8)).save(blank)
    for settings, n_image in (
        ({"QAP_N_KEEP": "2"}, 2),
        ({"QAP_KEEP_RATIO": "1", "QAP_SKIP_FLAT_TILES": "0"}, 144),
        ({"QAP_KEEP_RATIO": "1", "QAP_SKIP_FLAT_TILES": "0", "QAP_DUPLICATES": "0"}, 1),
    ):
        _, log = run(mmproj=mmproj, image=blank, env=settings)
        assert n_prompt(log) == n_image + 20, settings


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux's loader tells")
@pytest.mark.parametrize("name", ["llama-mtmd-cli", "llama-server"])
def test_each_library_is_loaded_once(name: str) -> None:
    env = {**os.environ, "LD_DEBUG": "libs"}
    done = subprocess.run([program(name), "--version"], env=env, capture_output=True, text=True, check=False)
    loaded = set(re.findall(r"calling init: (\S+/lib(?:qap|llama|ggml|mtmd)\S*)", done.stderr))
    names = sorted(path.rsplit("/", 1)[1] for path in loaded)
    assert len(names) == len(set(names))
    assert "libqap-mtmd.so.0" in names
    assert not any(found.startswith("libmtmd") for found in names)
