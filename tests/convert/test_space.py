"""Room on the disk, and conversions that are stopped: one line, nothing left, and the next run works."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dropin.children import environment
from qap_gguf.convert import QUANTIZE_TYPES, api, convert
from qap_gguf.convert.output import disk_space as space
from qap_gguf.convert.output.quantize import FLOAT_TYPES, least_bytes
from qap_gguf.errors import ConvertError

CHILD = Path(__file__).with_name("full_disk.py")
REFUSED = "free some space or choose another OUT"


def free(n_bytes: int) -> Callable[[Any], Any]:
    return lambda _: SimpleNamespace(free=n_bytes)


@pytest.mark.parametrize(
    ("kind", "keep"), [("F32", None), ("F32", False), ("Q8_0", None), ("Q8_0", False), ("Q4_0", None)]
)
def test_the_room_is_asked_for_before_anything_is_written(
    plain_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, keep: bool | None
) -> None:
    """Just enough is enough; half of it is not, and then no file was ever begun.

    A model that is relabelled is there twice, which is less than a quantized one and its float file.
    """
    asked: list[int] = []

    def note(folder: Path, n_bytes: int) -> None:
        asked.append(n_bytes)
        space.require_space(folder, n_bytes)

    monkeypatch.setattr(api, "require_space", note)
    made = convert(plain_llava, tmp_path / "a", quantize=kind, name="t", keep_positions=keep)
    sizes = [path.stat().st_size for path in (made.mmproj, made.model)]
    if kind == "F32":
        there = sum(sizes) + (sizes[1] if keep is None else 0)
        assert asked[0] < there < asked[0] + (1 << 19)  # but for the keys and the vocabulary
    else:
        float_model = convert(plain_llava, tmp_path / "f", quantize="F32", name="t").model.stat().st_size
        assert asked[0] < sum(sizes) + float_model
        assert asked[0] > sizes[0] * 0.9 + float_model * 0.9
    monkeypatch.setattr(shutil, "disk_usage", free(asked[0]))
    convert(plain_llava, tmp_path / "b", quantize=kind, name="t", keep_positions=keep)
    monkeypatch.setattr(shutil, "disk_usage", free(asked[0] // 2))
    monkeypatch.setattr(api, "write_gguf", lambda *_: pytest.fail("wrote"))
    with pytest.raises(ConvertError, match=REFUSED) as caught:
        convert(plain_llava, tmp_path / "c", quantize=kind, name="t", keep_positions=keep)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_disk_that_does_not_say_how_full_it_is(
    plain_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(shutil, "disk_usage", silent)
    assert convert(plain_llava, tmp_path, quantize="F16").model.is_file()


def test_every_type_has_a_lower_bound() -> None:
    sizes = {name: least_bytes(name, 1 << 20) / (1 << 20) for name in QUANTIZE_TYPES if name not in FLOAT_TYPES}
    assert sizes["Q4_0"] == sizes["Q4_K_S"] == sizes["Q4_K_M"] == 4.5 / 8
    assert sizes["IQ2_M"] == sizes["IQ2_S"]
    assert all(0.1 < size < 1.1 for size in sizes.values())


def child(*words: str | Path, before: list[str] | None = None) -> subprocess.Popen[str]:
    command = [*(before or []), sys.executable, str(CHILD), *map(str, words)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def sizes(plain_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    out = tmp_path_factory.mktemp("sizes")
    found: dict[str, int] = {}
    for kind in ("F32", "Q8_0"):
        made = convert(plain_llava, out, quantize=kind, mmproj_type="f32", name="t", force=True)
        found |= {kind: made.model.stat().st_size, "mmproj": made.mmproj.stat().st_size}
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("at", ["mmproj", "F32"])
def test_a_file_that_the_system_refuses_to_grow(
    plain_llava: Path, tmp_path: Path, sizes: dict[str, int], at: str
) -> None:
    said, errors = child(plain_llava, tmp_path / "out", f"fsize={sizes[at] // 2}").communicate(timeout=120)
    assert said.count("\n") == 1, errors
    assert said.startswith(f"expected to write to {tmp_path / 'out'}, got a refusal (")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["encoder", "float model", "quantizer"])
def test_a_small_disk_that_fills_up(plain_llava: Path, tmp_path: Path, sizes: dict[str, int], stage: str) -> None:
    namespace = ["unshare", "--mount"] if shutil.which("unshare") else []
    works = namespace and subprocess.run(
        [*namespace, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if not works or works.returncode:
        pytest.skip("no tmpfs can be mounted here: that takes Linux and its privileges")
    room = {
        "encoder": sizes["mmproj"] // 2,
        "float model": sizes["mmproj"] + sizes["F32"] // 2,
        "quantizer": sizes["mmproj"] + sizes["F32"] + sizes["Q8_0"] // 2,
    }[stage]
    out = tmp_path / "out"
    out.mkdir()
    said, errors = child(plain_llava, out, f"tmpfs={room}", before=namespace).communicate(timeout=120)
    assert said.count("\n") == 1, (said, errors)
    assert said.startswith("expected to write")
    assert said.endswith(REFUSED + "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing_and_can_be_repeated(
    plain_llava: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    running = child(plain_llava, out, "pause")
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert not out.exists()
    assert convert(plain_llava, out, quantize="Q8_0", name="t").model.is_file()
