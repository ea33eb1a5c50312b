"""The beginning of a file of the web: no more bytes than needed, and one line for each way in which a server fails."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

from files.far_server import WEB, FarServer, serving_files
from qap_gguf.errors import ModelFileError
from qap_gguf.files import web
from qap_gguf.files.web import WebFile, is_url, shown

MIB = 1 << 20
SIZE = 3 * MIB + 5
CONTENT = (bytes(range(251)) * (SIZE // 251 + 1))[:SIZE]
LARGE = 256 * MIB  # far above what sockets hold


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("far")
    (folder / "a.gguf").write_bytes(CONTENT)
    with (folder / "large.gguf").open("wb") as file:
        file.write(CONTENT)
        file.truncate(LARGE)
    (folder / "empty.gguf").touch()
    return folder


@pytest.fixture
def far(folder: Path) -> Iterator[FarServer]:
    """A server of each test's own: one that still writes to a test that hung up counts for no other test."""
    with serving_files(folder) as server:
        yield server


def test_ranges_grow_as_they_are_needed(far: FarServer) -> None:
    file = WebFile(f"{far.url}/ranges/a.gguf?token=1")
    assert (file.size, file.n_read, file.name) == (None, 0, f"{far.url}/ranges/a.gguf")
    assert file.more(4) == CONTENT[:MIB]
    assert file.more(MIB) == CONTENT[:MIB]
    assert (file.size, file.n_read, far.sent) == (SIZE, MIB, MIB)
    assert file.more(MIB + 1) == CONTENT[: 2 * MIB]
    assert file.more(SIZE + 99) == CONTENT
    assert file.n_read == far.sent == SIZE
    ranges = [headers["Range"] for _, headers in far.asked]
    assert ranges == [f"bytes=0-{MIB - 1}", f"bytes={MIB}-{2 * MIB - 1}", f"bytes={2 * MIB}-{SIZE - 1}"]
    assert {headers["Accept-Encoding"] for _, headers in far.asked} == {"identity"}


@pytest.mark.parametrize("way", ["ranges", "star", "small", "generous", "whole", "unsized", "own", "hops/5"])
def test_the_same_bytes_from_every_server(far: FarServer, way: str) -> None:
    file = WebFile(f"{far.url}/{way}/a.gguf")
    assert file.more(2 * MIB)[: 2 * MIB] == CONTENT[: 2 * MIB]
    assert file.more(2 * SIZE) == CONTENT
    assert file.size == (None if way in ("star", "unsized") else SIZE)
    file.close()


@pytest.mark.parametrize("way", ["whole", "unsized", "generous"])
def test_a_server_that_sends_more_than_was_asked_for_is_hung_up_on(far: FarServer, way: str) -> None:
    file = WebFile(f"{far.url}/{way}/large.gguf")
    assert file.more(MIB + 1)[:SIZE] == CONTENT[: file.n_read]
    file.close()
    assert file.n_read <= 2 * MIB
    assert far.sent < LARGE // 4  # what sockets hold, for a moment


def test_no_more_than_the_limit(far: FarServer) -> None:
    assert WebFile(f"{far.url}/ranges/a.gguf", most=1000).more(5000) == CONTENT[:1000]
    assert far.sent == 1000


@pytest.mark.parametrize(
    ("path", "n_bytes", "words"),
    [
        ("none", 1, "status 404; check the address"),
        ("status/401", 1, "status 401; it wants a login"),
        ("status/403", 1, "status 403; it gives no access"),
        ("status/503", 1, "status 503; try again later"),
        ("status/204", 1, "status 204; check the address"),
        ("status/304", 1, "status 304"),
        ("gzip/a.gguf", 1, "sends it as 'gzip'"),
        ("short/a.gguf", 1, f"expected {MIB} bytes of .*, got {MIB - 100}: cut off"),
        ("cut/a.gguf", 1, f"expected {SIZE} bytes of .*, got 1000: cut off"),
        ("elsewhere/a.gguf", 1, "expected bytes from 0 on"),
        ("bare/a.gguf", 1, "the server gives 'rows 1-2/3'"),
        ("changes/large.gguf", 2 * MIB, "it changed meanwhile"),
        ("hops/6/a.gguf", 1, "5 redirects and more"),
        ("away/file", 1, "expected a percent-encoded https address, got 'file:"),
        ("away/http", 1, "expected https, got the address .*--allow-http"),
    ],
)  # fmt: skip
def test_what_servers_do_wrong_is_a_line(far: FarServer, path: str, n_bytes: int, words: str) -> None:
    file = WebFile(f"{far.url}/{path}?secret=1")
    with pytest.raises(ModelFileError, match=words) as caught:
        _ = [file.more(n) for n in (1, n_bytes)]
    file.close()
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_range_beyond_the_size_that_it_names(far: FarServer) -> None:
    with pytest.raises(ModelFileError, match=f"expected a range within {3 * MIB} bytes"):
        WebFile(f"{far.url}/lies/large.gguf").more(4 * MIB)


@pytest.mark.parametrize("way", ["empty/x", "nothing/x"])
def test_an_empty_file(far: FarServer, way: str) -> None:
    assert WebFile(f"{far.url}/{way}").more(10) == b""


def test_a_login_stays_with_its_server(far: FarServer, tmp_path: Path) -> None:
    with serving_files(far.folder) as other:
        far.leads_to = other.url
        login = {"Authorization": "Bearer secret"}
        assert WebFile(f"{far.url}/to/a.gguf", headers=login).more(9)[:9] == CONTENT[:9]
        assert WebFile(f"{far.url}/own/a.gguf", headers=login).more(9)[:9] == CONTENT[:9]
        assert [headers.get("Authorization") for _, headers in far.asked] == ["Bearer secret"] * 3
        (_, headers), = other.asked  # fmt: skip
        assert headers.get("Authorization") is None
        assert headers["Range"] == f"bytes=0-{MIB - 1}"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"{WEB}example/a.gguf", "expected https"),
        (f"{WEB}localhost.example/a.gguf", "expected https"),
        (f"{WEB}10.0.0.8/a.gguf", "expected https"),
        ("https:" + "//", "percent-encoded"),
        (f"{WEB}localhost/a b.gguf", "percent-encoded"),
        (f"{WEB}localhost/\u00e9.gguf", "percent-encoded"),
        (f"{WEB}localhost:99999/a", "percent-encoded"),
        (f"{WEB}[::1/a", "percent-encoded"),
    ],
)
def test_addresses_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        WebFile(url)


def test_plain_http_where_it_is_allowed() -> None:
    for url in (f"{WEB}localhost/a", f"{WEB}127.0.0.1:8080/a", f"{WEB}[::1]/a", "https://example/a"):
        WebFile(url)
    WebFile(f"{WEB}example/a", allow_http=True)


def test_nothing_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"{WEB}127.0.0.1:{closed.getsockname()[1]}/a"
    for address in (url, url.replace("http", "https")):
        with pytest.raises(ModelFileError, match=r"cannot be read .*; check the address and the connection"):
            WebFile(address).more(1)


def test_servers_that_take_their_time(far: FarServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_SILENCE_S", 0.2)
    with pytest.raises(ModelFileError, match="timed out"):
        WebFile(f"{far.url}/silent/a").more(1)
    monkeypatch.setattr(web, "_TOTAL_S", 0.3)
    with pytest.raises(ModelFileError, match=r"within 0 s, got \d+ bytes by then"):
        WebFile(f"{far.url}/drips/a").more(50)


def test_what_is_an_address() -> None:
    assert all(map(is_url, ("https://example/a", "HTTPS://example/a", f"{WEB}example")))
    assert not any(map(is_url, ("a.gguf", "https:/a", "ftp://example/a", "owner/name", "")))
    assert shown("https://example/a?b=c#d") == shown("https://example/a#d?") == "https://example/a"
