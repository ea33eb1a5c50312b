"""Ray Data on a cluster of two nodes on this machine: an actor is killed, a node is removed, every row is there once.

Ray's processes take most of the time: two nodes, two actors each with a llama-server.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import qap_gguf as qap

ray: Any = pytest.importorskip("ray", reason="needs ray, which has no wheel everywhere")
pytest.importorskip("ray.data", reason="needs the extra ray")
pytestmark = [
    pytest.mark.usefixtures("program"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills processes that it finds in /proc"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
SAMPLE = str(qap.packaged_model().sample)
N = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = found.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(address=found.address, log_to_driver=False, configure_logging=False)
    try:
        yield found, node
    finally:
        ray.shutdown()
        found.shutdown()


def slowly(row: dict[str, Any]) -> dict[str, Any]:
    """So that there is time to kill."""
    time.sleep(0.2)
    return row
