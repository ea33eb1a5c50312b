"""llama-mtmd-cli prunes by its environment; each library is in its process once."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import qap_gguf as qap
from programs.conftest import program


def run(**env: str) -> tuple[str, str]:
    """(answer, log) of one question about the packaged picture."""
    files = qap.packaged_model()
    words = ["-m", files.model, "--mmproj", files.mmproj, "--image", files.sample, "-p", "What is in row 2, column 4?"]
    done = subprocess.run(
        [program("llama-mtmd-cli"), *map(str, words), "--threads", "1", "-n", "8", "--temp", "0", "-lv", "4"],
        env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("env", "n_image"), [({}, 144), ({"QAP_KEEP_RATIO": "0.125"}, 18)])
def test_it_prunes_by_its_environment(env: dict[str, str], n_image: int) -> None:
    said, log = run(**env)
    assert "boat" in said
    found = re.search(r"prompt eval time.*?/\s*(\d+) tokens", log)
    assert found is not None
    assert int(found[1]) == n_image + 20


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
