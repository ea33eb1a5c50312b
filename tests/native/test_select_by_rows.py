"""dpp without the table of cosines: the same indices, also among ties, and memory for rows instead of pairs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf.defaults import to_params
from qap_gguf.errors import ArrayError
from qap_gguf.pruning.score import cosines

F32 = npt.NDArray[np.float32]


def by_table(x: F32, s: F32, k: int) -> list[int]:
    return list(map(int, _core.select(s, cosines(x, n_threads=1), len(s), k, "dpp", 0)))


def by_rows(x: F32, s: F32, k: int, n_threads: int = 1) -> list[int]:
    return list(map(int, _core.select_by_rows(x, s, k, n_threads)))


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 80),
    d=st.sampled_from([1, 2, 3, 7, 16, 17, 32, 64, 100, 256]),  # both ways that ggml multiplies in
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-38, 1e-6, 1.0, 1e30]),
    kind=st.sampled_from(["normal", "whole numbers", "equal tokens", "few directions"]),
    data=st.data(),
)
def test_the_choice_is_that_of_the_table(
    n: int, d: int, seed: int, scale: float, kind: str, data: st.DataObject
) -> None:
    """Not nearly: cosines are the same numbers, so that ties fall alike."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    if kind == "whole numbers":
        x = rng.integers(-2, 3, (n, d)).astype(float)
    elif kind == "equal tokens":
        x = x[rng.integers(0, max(1, n // 3), n)] * 2.0 ** rng.integers(-3, 4, (n, 1))
    elif kind == "few directions":
        x = rng.standard_normal((n, 2)) @ rng.standard_normal((2, d))
    x[rng.random(n) < 0.1] = 0.0
    features: F32 = np.ascontiguousarray(np.clip(x / 10 * scale, -1e30, 1e30), np.float32)
    s = rng.choice(rng.random(4), n).astype(np.float32) if seed % 2 else rng.random(n).astype(np.float32)
    k = data.draw(st.integers(1, n), "k")
    assert by_rows(features, s, k, n_threads=1 + seed % 3) == by_table(features, s, k)


def large(n: int, d: int) -> tuple[F32, F32]:
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, d)).astype(np.float32), rng.uniform(0.05, 1.0, n).astype(np.float32)


def test_many_tokens() -> None:
    """Above the limit, in several blocks of tokens: by select(), and by what prunes pictures."""
    n, k = 4100, 60
    assert [_core.selects_by_rows("dpp", tokens) for tokens in (4096, 4097)] == [False, True]
    assert not _core.selects_by_rows("coverage", n)
    x, s = large(n, 24)
    expected = by_table(x, s, k)
    assert qap.select(s, k, x, "dpp").tolist() == expected
    config = qap.PruneConfig(n_keep=k, select="dpp", semantic="none")
    scores = qap.score(x, config)
    found = _core.prune(
        rows=x, n_planes=1, special=[], padding=[], attention=None, received=None, prompt=None, prompt_semantic="auto",
        params=to_params(config), n_keep=k, device=None, n_threads=1,
    )  # fmt: skip
    assert found["indices"].tolist() == by_table(x, scores.total, k)


MEMORY = """
import resource, numpy as np, qap_gguf as qap
rng = np.random.default_rng(0)
x, s = rng.standard_normal((12000, 16)).astype(np.float32), rng.uniform(0.05, 1, 12000).astype(np.float32)
qap.select(s[:9], 3, x[:9], "dpp")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(qap.select(s, 100, x, "dpp")) == 100
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kilobytes of a Linux process")
def test_memory_of_rows() -> None:
    """The cosines of 12,000 tokens would take 576 MB, twice."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 40e6


def test_what_is_refused() -> None:
    x, s = large(20, 4)
    bad = x.copy()
    bad[7, 2] = np.inf
    with pytest.raises(ValueError, match="token 7, channel 2"):
        _core.select_by_rows(bad, s, 3, 1)
    s[5] = np.nan
    with pytest.raises(ValueError, match="finite scores, got nan at token 5"):
        _core.select_by_rows(x, s, 3, 1)
    for k in (0, 21):
        with pytest.raises(ValueError, match=r"1\.\.n_tok"):
            _core.select_by_rows(x, s, k, 1)
    x, s = large(4100, 4)
    x[9, 1] = np.nan
    with pytest.raises(ArrayError, match="token 9, channel 1"):
        qap.select(s, 5, x, "dpp")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc/meminfo")
@pytest.mark.parametrize("fields", [{"select": "coverage"}, {"select": "topk", "merge": "average"}], ids=str)
def test_pairs_without_room_are_refused(fields: dict[str, str]) -> None:
    """One line instead of the system's killer; so many tokens that their pairs take twice what is free."""
    words = Path("/proc/meminfo").read_text().split()
    free = sum(int(words[words.index(name) + 1]) * 1024 for name in ("MemAvailable:", "SwapFree:"))
    x = np.ones((int((free / 4) ** 0.5), 1), np.float32)
    config = qap.PruneConfig(n_keep=5, semantic="none", **fields)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"expected to fit [\d.]+ GB of free memory, needs [\d.]+ GB to compare"
    ) as err:
        _core.prune(
            rows=x, n_planes=1, special=[], padding=[], attention=None, received=None, prompt=None,
            prompt_semantic="auto", params=to_params(config), n_keep=5, device=None, n_threads=1,
        )  # fmt: skip
    assert "\n" not in str(err.value)
