"""What an encode copies from the device to the host: the kept rows and some arrays of N numbers, and nothing else.

Two counts are compared with what must be copied: the library's own (`bytes_read` in a chunk's report), and that of
count_reads.c, which stands in front of ggml's copying functions in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap

HERE = Path(__file__).resolve().parent
FLOAT = 4

ALWAYS = {"error", "outlier", "sensitivity", "total"}
# a config -> the arrays of N that it reads, whether N x N cosines are read, and whether all rows are
CASES: dict[str, tuple[dict[str, Any] | None, set[str], bool, bool]] = {
    "topk": ({"n_keep": 18, "select": "topk"}, ALWAYS | {"attention", "semantic"}, False, False),
    "no relevance": ({"n_keep": 18, "select": "topk", "semantic": "none"}, ALWAYS, False, False),
    "attention received": (
        {"n_keep": 5, "select": "topk", "semantic": "attention"},
        ALWAYS | {"received", "semantic"},
        False,
        False,
    ),
    "random": ({"n_keep": 1, "select": "random"}, ALWAYS | {"attention", "semantic"}, False, False),
    "all kept": ({"n_keep": 144, "select": "topk"}, ALWAYS | {"attention", "semantic"}, False, True),
    "dpp": ({"n_keep": 18, "select": "dpp"}, ALWAYS | {"attention", "semantic"}, True, False),
    "divprune": ({"n_keep": 18, "select": "divprune"}, ALWAYS | {"attention", "semantic"}, True, False),
    "coverage": ({"n_keep": 18, "select": "coverage"}, ALWAYS | {"attention", "semantic"}, True, False),
    "merge": ({"n_keep": 18, "merge": "average"}, ALWAYS | {"attention", "semantic"}, True, True),
    "dynamic alpha": (
        {"n_keep": 18, "select": "topk", "alpha": "dynamic"},
        ALWAYS | {"attention", "semantic"},
        False,
        False,
    ),
    "for the cache": (None, {"attention", "received"}, False, True),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler, to stand in front of ggml's functions")
    library = tmp_path_factory.mktemp("count") / "libcount.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "count_reads.c"), "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, str(HERE / "probe.py"), json.dumps([config for config, *_ in CASES.values()])],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_needed_crosses(rows: dict[str, dict[str, Any]], case: str) -> None:
    config, arrays, cosines, all_rows = CASES[case]
    row = rows[case]
    n, d = row["n_total"], row["n_embd"]
    k = n if config is None else config["n_keep"]
    assert (n, row["n_keep"]) == (144, k)
    assert set(row["arrays"]) == arrays
    assert set(row["arrays"].values()) == {n}

    needed = FLOAT * ((n if all_rows else k) * d + n * len(arrays) + (n * n if cosines else 0))
    needed += FLOAT if case == "dynamic alpha" else 0
    assert row["reported"] == needed
    assert row["counted"] == needed
    if not all_rows:
        assert row["largest"] < FLOAT * n * d


def test_the_count_is_in_the_embedding_and_in_the_statistics() -> None:
    with qap.VisionModel(device="cpu", n_ctx=512) as vlm:
        image = vlm.encode(qap.packaged_model().sample)
        assert image.attention is not None
        assert image.received is not None
        assert image.bytes_read == sum(a.nbytes for a in (image.features, image.attention, image.received))
        answer = vlm.generate([image, image, "?"], prune=qap.PruneConfig(n_keep=2), max_tokens=1, stream=True)
        "".join(answer)
        assert answer.stats.encode_bytes == image.bytes_read  # encoded once, though it stands in the prompt twice
        assert answer.stats.to_dict()["encode_bytes"] == answer.stats.encode_bytes
