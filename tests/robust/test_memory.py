"""What the gate takes for free: control groups of both versions at every level, and what pairs of patches need."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from gguf_mutations import Gguf
from qap_gguf import _core
from qap_gguf.errors import ModelFileError
from qap_gguf.files.gguf import check_mmproj
from robust.test_gate import I32, U32, V, changed, value
from tiny_mmproj import tiny_mmproj, tiny_uncompared

GB = 10**9
F32_TYPE, F16_TYPE = 0, 1
Room = Callable[[str, dict[str, str]], tuple[float, float]]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """room(lines of /proc/self/cgroup, files below /sys/fs/cgroup) -> (all, free)."""

    def read(lines: str, files: dict[str, str]) -> tuple[float, float]:
        mount = tmp_path / "mount"
        for name, text in files.items():
            path = mount / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        groups = tmp_path / "cgroup"
        groups.write_text(lines + "\n")
        return _core.container_room(str(groups), str(mount))

    return read


def v2(folder: str, limit: str, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon 5\nfile 7\nactive_file {cache // 2}\ninactive_file {cache // 2}"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": str(used), f"{folder}/memory.stat": stat}


def v1(folder: str, limit: int, used: int, cache: int = 0) -> dict[str, str]:
    return {
        f"memory/{folder}/memory.limit_in_bytes": str(limit), f"memory/{folder}/memory.usage_in_bytes": str(used),
        f"memory/{folder}/memory.stat": f"cache {cache}\ninactive_file {cache}",
    }  # fmt: skip


def test_version_2_at_every_level(room: Room) -> None:
    inside = v2("a/b", "max", 0)
    assert room("0::/a/b", inside) == (math.inf, math.inf)
    assert room("0::/a/b", inside | v2("a", str(8 * GB), 3 * GB)) == (8 * GB, 5 * GB)
    assert room("0::/a/b", v2("a/b", str(6 * GB), 2 * GB)) == (6 * GB, 4 * GB)
    assert room("0::/a/b", v2("a", str(5 * GB), 4 * GB, 2 * GB)) == (5 * GB, 3 * GB)


def test_the_root_of_a_container(room: Room) -> None:
    """The path may be the host's, of which nothing is seen inside."""
    assert room("0::/", v2(".", str(4 * GB), GB)) == (4 * GB, 3 * GB)
    assert room("0::/docker/0123", {}) == (4 * GB, 3 * GB)
    assert room("0::/../../other", {}) == (4 * GB, 3 * GB)


def test_version_1(room: Room) -> None:
    lines = "12:cpu,cpuacct:/x\n7:memory:/a/b\n1:name=systemd:/y\n0::/z"
    assert room(lines, v1("a/b", 2**63 - 4096, GB)) == (math.inf, math.inf)
    assert room(lines, v1("a", 3 * GB, 2 * GB)) == (3 * GB, GB)
    assert room(lines, v1(".", 2 * GB, 2 * GB, GB)) == (2 * GB, GB)


def test_nothing_to_read(room: Room) -> None:
    for lines in ("", "nonsense", "0:", "0::", "1:cpu:/a"):
        assert room(lines, {}) == (math.inf, math.inf)
    assert _core.container_room("/nowhere/at/all", "/nowhere") == (math.inf, math.inf)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/meminfo")
def test_pairs_of_patches_are_counted_as_measured(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    """65,025 patches: their cosines in the graph's buffer and in ours, 8 bytes a pair."""
    words = Path("/proc/meminfo").read_text().split()
    if int(words[words.index("MemAvailable:") + 1]) * 1024 > 30 * GB:
        pytest.skip("this machine has room for them")
    file = Gguf(packaged.mmproj.read_bytes())
    path = tmp_path / "large.gguf"
    keys = {V + "image_size": value(U32, 255 * 16)}
    path.write_bytes(changed(file, keys, {"v.position_embd.weight": ([192, 255 * 255 + 1], F16_TYPE)}))
    check_mmproj(path, memory=False)
    with pytest.raises(ModelFileError, match=r"needs 3[4-9]\.\d GB"):
        check_mmproj(path)


def test_tiles_are_counted(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    """The pairs of tokens of LLaVA-NeXT's largest grid. A list that pictures are not cut by counts for nothing."""
    file = Gguf(packaged.mmproj.read_bytes())  # 12 x 12 tokens, 192 pixels
    newline = {"v.image_newline": ([256], F32_TYPE)}

    def needed(grid: list[int], tensors: dict[str, tuple[list[int], int]]) -> float:
        path = tmp_path / "tiles.gguf"
        path.write_bytes(changed(file, {V + "image_grid_pinpoints": value(I32, grid)} if grid else {}, tensors))
        return _core.mmproj_bytes(str(path))

    one = needed([], {})
    for grid, lines, columns in (([384, 192], 12, 24), ([192, 384, 384, 384], 24, 24), ([1152, 768, 192, 192], 48, 72)):
        n = 144 + lines * columns
        assert 8 * n**2 < needed(grid, newline) - one < 8 * n**2 + 40_000 * n
    for grid, tensors in (([384, 384], {}), ([384, 384, 200, 192], newline), ([192 * 17, 192 * 16], newline)):
        assert needed(grid, tensors) == pytest.approx(one, rel=0.01)


def test_merged_patches_are_one_token(tmp_path: Path) -> None:
    """Mistral 3: pairs are those of tokens, a quarter of its 128 x 128 patches."""
    path, needed = tmp_path / "merged.gguf", []
    file = Gguf(tiny_mmproj("pixtral"))
    for side in (8, 8 * 128):
        path.write_bytes(changed(file, {V + "image_size": value(U32, side)}, {}))
        needed.append(_core.mmproj_bytes(str(path)))
    assert 2 * 16384**2 < needed[1] - needed[0] < 2.5 * 16384**2


def test_gemma_3n_has_no_pairs_of_patches(tmp_path: Path) -> None:
    """Its file says 768 pixels and patches of 3, of which it makes 256 tokens: not 65,536 patches, in pairs."""
    path = tmp_path / "convolutions.gguf"
    path.write_bytes(tiny_uncompared("gemma3nv", side=768))
    assert 768**2 * 4 * 96 < _core.mmproj_bytes(str(path)) < 0.5e9


def test_tiles_that_are_encoded_one_by_one(tmp_path: Path) -> None:
    """Their pixels and rows are there all at once; what is scored is one tile. Some files do not say how many."""
    path = tmp_path / "tiles.gguf"
    cases = {
        "llama4": ("preproc_max_tiles", 16),
        "internvl": ("preproc_max_tiles", 12),
        "idefics3": ("preproc_image_size", 0),
    }
    for projector, (key, usual) in cases.items():
        file = Gguf(tiny_mmproj(projector))

        def needed(most: int | None, key: str = key, file: Gguf = file) -> float:
            keys = {} if most is None else {V + key: value(U32, most)}
            path.write_bytes(changed(file, keys, {}))
            return _core.mmproj_bytes(str(path))

        edge = 64 if projector == "idefics3" else 0  # pixels there, a count of tiles elsewhere
        one, four = needed(edge or 1), needed(2 * edge or 4)
        tokens, pixels = 4 * 4 * 256 * 4, 3 * 64 * 64
        assert 5 * (tokens + 3 * pixels) < four - one < 5 * (3 * tokens + 5 * pixels), projector
        if usual:
            assert needed(None) == needed(usual) > four


def test_pairs_of_patches_without_flash_attention(tmp_path: Path) -> None:
    """All heads' pairs in f32, where flash attention has a mask alone."""
    path = tmp_path / "large.gguf"
    path.write_bytes(changed(Gguf(tiny_mmproj("pixtral")), {V + "image_size": value(U32, 8 * 128)}, {}))
    pairs, heads = 128**4, 4
    more = _core.mmproj_bytes(str(path), False) - _core.mmproj_bytes(str(path))
    assert more == pytest.approx((4 * heads - 2) * pairs, rel=0.01)


def test_an_encoder_without_flash_attention_and_without_room_is_refused(tmp_path: Path) -> None:
    here = float(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    free = min(here, _core.container_room("/proc/self/cgroup", "/sys/fs/cgroup")[1])
    side = int((free / 32) ** 0.25) // 2 * 2  # in patches: pairs of 16 heads take twice what is free, a mask a part
    if side > 255:
        pytest.skip("needs a machine with less memory")
    keys = {V + "image_size": value(U32, 8 * side), V + "attention.head_count": value(U32, 16)}
    path = tmp_path / "large.gguf"
    path.write_bytes(changed(Gguf(tiny_mmproj("pixtral")), keys, {}))
    check_mmproj(path)
    with pytest.raises(ModelFileError, match=r"expected to fit \d+\.\d GB of (free|all) memory, needs"):
        qap.VisionModel(path, qap.packaged_model().model, n_ctx=256, n_threads=1, flash_attn=False)


def test_a_grid_without_room_is_refused(tmp_path: Path, packaged: qap.PackagedModel) -> None:
    path = tmp_path / "tiles.gguf"
    keys = {V + "image_size": value(U32, 64 * 16), V + "image_grid_pinpoints": value(I32, [16 * 1024, 16 * 1024])}
    places = {"v.position_embd.weight": ([192, 64 * 64 + 1], F16_TYPE), "v.image_newline": ([256], F32_TYPE)}
    path.write_bytes(changed(Gguf(packaged.mmproj.read_bytes()), keys, places))
    with pytest.raises(ModelFileError, match=r"needs 88\d\d\.\d GB"):  # a million tokens
        check_mmproj(path)
