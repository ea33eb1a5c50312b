"""Ray Data on a cluster of two nodes on this machine: an actor is killed, a node is removed, every row is there once.

Ray's processes take most of the time: two nodes, and an actor with a llama-server on each.
"""

from __future__ import annotations

import os
import runpy
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap
from batch.conftest import QUESTION, make_pictures
from qap_gguf.ray import COLUMNS, VisionPredictor

ray: Any = pytest.importorskip("ray", reason="needs ray, which has no wheel for every system")
pytest.importorskip("pyarrow", reason="needs the extra ray")
pytestmark = [
    pytest.mark.usefixtures("program"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="two nodes on one machine are for Linux"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
ROOT = Path(__file__).resolve().parents[2]
SAMPLE = qap.packaged_model().sample
SMALL: dict[str, Any] = {"prompt": QUESTION, "prune": qap.PruneConfig(n_keep=72), "n_ctx": 512, "n_threads": 1}
N = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU each; the second can be removed."""
    import ray.data
    from ray.cluster_utils import Cluster

    # no word to anybody, and a token of this run's own in place of one in the home folder
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=small)
    try:
        found.second = found.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=found.address, log_to_driver=False, configure_logging=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def test_the_example(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: another one would be another job, with workers of its own to start."""
    import pyarrow.parquet

    make_pictures(tmp_path / "photos", 5, 1)
    words = [tmp_path / "photos", tmp_path / "out", "--address", cluster.address, "--actors", "1", "--prompt", QUESTION]
    monkeypatch.setattr(sys, "argv", ["ray_captions.py", *map(str, words)])
    example = runpy.run_path(str(ROOT / "examples" / "ray_captions.py"))
    assert example["main"]() == 0

    rows = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    assert len({row["path"] for row in rows}) == len(rows) == 5
    assert sum(bool(row["error"]) for row in rows) == 1
    assert [set(COLUMNS) | {"path"}] * 5 == [set(row) for row in rows]


def test_the_recipe_without_our_class(cluster: Any) -> None:
    pytest.importorskip("aiohttp", reason="Ray's requests need it")
    pytest.importorskip("starlette", reason="needs the extra serve")
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    from serve.conftest import URI, serving

    def question(row: dict[str, Any]) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": row["uri"]}}, {"type": "text", "text": QUESTION}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0}
        return {"payload": {**body, "prune": {"n_keep": 72}}}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        found = row["http_response"]
        kept = found["prune"]["images"][0]["n_kept"]
        return {"answer": found["choices"][0]["message"]["content"], "kept": kept}

    with serving("--ctx", "512") as server:
        config = HttpRequestProcessorConfig(url=server.url + "/v1/chat/completions", concurrency=1, batch_size=4)
        ask = build_processor(config, preprocess=question, postprocess=answer)
        rows = ask(ray.data.from_items([{"uri": URI} for _ in range(6)])).take_all()
    assert [(row["answer"], row["kept"]) for row in rows] == [("house", 72)] * 6


def test_an_actor_is_killed_and_a_node_removed(cluster: Any) -> None:
    class Slow(VisionPredictor):
        """Says which process it is, and leaves time to end it."""

        def __call__(self, batch: Any) -> Any:
            time.sleep(0.2)
            out = super().__call__(batch)
            return out | {"pid": [os.getpid()] * len(out["id"])}

    rows = [{"id": i, "image": str(SAMPLE) if i % 8 else "none.png"} for i in range(N)]
    found = ray.data.from_items(rows, override_num_blocks=N // 2).map_batches(
        Slow, fn_constructor_kwargs=SMALL, batch_size=2, num_cpus=1, compute=ray.data.ActorPoolStrategy(size=2)
    )
    out: list[dict[str, Any]] = []
    for row in found.iter_rows():
        out.append(row)
        if len(out) == 6:
            os.kill(row["pid"], signal.SIGKILL)
        if len(out) == 12:
            cluster.remove_node(cluster.second, allow_graceful=False)
    assert sorted(row["id"] for row in out) == list(range(N))
    assert all((row["answer"], row["kept"]) == ("house", 72) for row in out if row["id"] % 8)
    assert all("none at 'none.png'" in row["error"] for row in out if not row["id"] % 8)
    assert len({row["pid"] for row in out}) >= 3


def test_kinds_of_batches() -> None:
    """In no actor: Ray calls the class with one of these."""
    import numpy
    import pandas
    import pyarrow

    values = {"bytes": [SAMPLE.read_bytes(), b"none"], "n_keep": [18, 18], "label": ["x", "y"]}
    batches = (
        {name: numpy.array(cells, dtype=object) for name, cells in values.items()},
        pandas.DataFrame(values),
        pyarrow.table(values),
    )
    ask = VisionPredictor(**SMALL, image_column="bytes")
    for batch in batches:
        out = ask(batch)
        assert type(out) is type(batch)
        table = out.to_pydict() if isinstance(out, pyarrow.Table) else {name: list(out[name]) for name in out}
        assert set(table) == {"n_keep", "label", *COLUMNS}
        assert table["label"] == ["x", "y"]
        assert table["answer"][1] == ""
        assert table["kept"] == [18, 0]
        assert "image" in table["error"][1]
    with pytest.raises(qap.ConfigError, match="expected a column 'bytes', got label"):
        ask({"label": [1]})
    with pytest.raises(qap.ConfigError, match="expected arrays, a data frame or a table"):
        ask([1])
    ask.close()
