"""How many CPU threads are used where none were asked for: cores, affinity, control groups, QAP_THREADS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qap_gguf.arguments import n_threads_default
from qap_gguf.errors import ConfigError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the folders of Linux")


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores with two logical processors each."""
    monkeypatch.delenv("QAP_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    for cpu in range(8):
        put(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    return tmp_path


def test_one_for_each_physical_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert n_threads_default(machine) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 2, 5})
    assert n_threads_default(machine) == 2


def test_fast_cores_only(machine: Path) -> None:
    put(machine, "sys/devices/cpu_core/cpus", "0-1,4-5")
    assert n_threads_default(machine) == 2


def test_a_machine_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QAP_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 3, 5})
    assert n_threads_default(tmp_path) == 3


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "100000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 1),
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "max 100000", "sys/fs/cgroup/a/b/cpu.max": "300000 100000"}, 3),
        ("3:cpu,cpuacct:/a", {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000",
                              "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu,cpuacct:/a", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                              "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpuset:/a\n4:memory:/a", {}, 4),
    ],
)  # fmt: skip
def test_no_more_than_control_groups_give_time_for(
    machine: Path, line: str, files: dict[str, str], expected: int
) -> None:
    put(machine, "proc/self/cgroup", line)
    for name, text in files.items():
        put(machine, name, text)
    assert n_threads_default(machine) == expected


def test_the_environment_decides(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAP_THREADS", "7")
    assert n_threads_default(machine) == 7
    monkeypatch.setenv("QAP_THREADS", "")
    assert n_threads_default(machine) == 4
    for wrong in ("0", "-1", "two", "1025", " 2"):
        monkeypatch.setenv("QAP_THREADS", wrong)
        with pytest.raises(ConfigError, match=r"QAP_THREADS: expected 1\.\.1024"):
            n_threads_default(machine)
