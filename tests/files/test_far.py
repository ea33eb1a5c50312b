"""Headers of far GGUF files, and the files that stand in for them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from files.far_server import FarServer, serving_files
from qap_gguf import _core
from qap_gguf.errors import ModelFileError
from qap_gguf.files import far as far_module
from qap_gguf.files.far import fetch_header, part_urls, read_header, stand_in
from qap_gguf.files.gguf import read_gguf
from qap_gguf.files.web import WebFile

PACKAGED = qap.packaged_model()
MIB = 1 << 20


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarServer]:
    folder = tmp_path / "far"
    folder.mkdir()
    for path in (PACKAGED.model, PACKAGED.mmproj):
        (folder / path.name).symlink_to(path)
    with serving_files(folder) as server:
        yield server


@pytest.mark.parametrize("path", [PACKAGED.model, PACKAGED.mmproj], ids=["model", "mmproj"])
def test_a_stand_in_says_what_the_file_says(far: FarServer, tmp_path: Path, path: Path) -> None:
    header = read_header(WebFile(f"{far.url}/ranges/{path.name}"))
    metadata, tensors, begin = _core.gguf_info(str(path))
    assert header.data == path.read_bytes()[:begin]
    assert header.size == path.stat().st_size
    assert MIB <= header.n_read == far.sent <= max(2 * begin, MIB)
    assert len(far.asked) <= 3
    stand_in(header, tmp_path / "a.gguf", "far")
    assert _core.gguf_info(str(tmp_path / "a.gguf")) == (metadata, tensors, begin)
    found = (tmp_path / "a.gguf").stat()
    assert path.stat().st_size - 32 < found.st_size <= path.stat().st_size  # the padding after the last tensor
    assert found.st_blocks * 512 < begin + 2**16  # a hole takes no room


def test_a_file_that_is_cut_short(far: FarServer, tmp_path: Path) -> None:
    (far.folder / "cut.gguf").write_bytes(PACKAGED.mmproj.read_bytes()[:-1000])
    path, _, size = fetch_header([("far name", f"{far.url}/ranges/cut.gguf")], tmp_path)
    assert size == PACKAGED.mmproj.stat().st_size - 1000
    with pytest.raises(ModelFileError, match=f"got {size}: .* is cut short"):
        read_gguf(path)


def head(n_tensors: int, n_keys: int, rest: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys) + rest


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


WRONG = {
    "another kind": (b"PK\3\4" + bytes(99), "expected a GGUF file, got another kind at"),
    "empty": (b"", "expected a GGUF file, got another kind at"),
    "four bytes": (b"GGUF", "damaged, longer or cut short"),
    "no keys": (head(1, 9, b""), "damaged, longer or cut short"),
    "too many keys": (head(1, 2**60, bytes(99)), "damaged, longer or cut short"),
    "an endless text": (head(1, 1, key("a", 8, struct.pack("<Q", 2**40))), "damaged, longer or cut short"),
    "an endless list": (head(1, 1, key("a", 9, struct.pack("<IQ", 0, 2**40)) + bytes(99)), "damaged, longer or"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_header(far: FarServer, case: str) -> None:
    content, words = WRONG[case]
    (far.folder / "a.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match=words):
        read_header(WebFile(f"{far.url}/ranges/a.gguf"))
    assert far.sent <= MIB


@pytest.mark.parametrize("way", ["ranges", "star", "whole"])
def test_a_header_beyond_the_limit(far: FarServer, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A list that goes on and on: no more of it is fetched, or asked memory for, than the limit."""
    monkeypatch.setattr(far_module, "MOST", 2 * MIB)
    with (far.folder / "a.gguf").open("wb") as file:
        file.write(head(1, 1, key("a", 9, struct.pack("<IQ", 0, 2**27))))
        file.truncate(2**28)
    web = WebFile(f"{far.url}/{way}/a.gguf", most=2 * MIB)
    with pytest.raises(ModelFileError, match=f"in the first {2 * MIB} bytes"):
        read_header(web)
    assert web.n_read <= 2 * MIB


def test_a_page_instead_of_the_file(far: FarServer) -> None:
    with pytest.raises(ModelFileError, match=r"got another kind \(text/html\) at .*; give the address of the .gguf"):
        read_header(WebFile(f"{far.url}/page/a.gguf"))
    with pytest.raises(ModelFileError, match="with /resolve/ instead of /blob/"):
        read_header(WebFile(f"{far.url}/page/owner/name/blob/main/a.gguf"))


def test_errors_of_the_server_pass_through_the_reader(far: FarServer) -> None:
    """The second range is where it fails, within ggml's reader."""
    web = WebFile(f"{far.url}/ranges/{PACKAGED.model.name}")
    assert web.more(4)
    (far.folder / PACKAGED.model.name).unlink()
    with pytest.raises(ModelFileError, match="status 404"):
        read_header(web)


def test_no_disk_for_a_file_of_that_length(far: FarServer, tmp_path: Path) -> None:
    """A header that promises 2^62 bytes, from a server that does not tell the file's size."""
    row = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 2**60, 0, 0)
    (far.folder / "a.gguf").write_bytes(head(1, 0, row) + bytes(64))
    with pytest.raises(ModelFileError, match="expected a file that a disk can take, far name says"):
        fetch_header([("far name", f"{far.url}/star/a.gguf")], tmp_path)


def test_addresses_of_parts() -> None:
    assert part_urls("https://example/x/a.gguf") == ["https://example/x/a.gguf"]
    assert part_urls("https://example/a-00001-of-00003.gguf?b#c") == [
        f"https://example/a-0000{i}-of-00003.gguf?b#c" for i in (1, 2, 3)
    ]
    for other in ("a-00002-of-00003.gguf", "a-00001-of-00001.gguf", "a-00001-of-00513.gguf", "a-1-of-3.gguf"):
        assert part_urls(f"https://example/{other}") == [f"https://example/{other}"]
