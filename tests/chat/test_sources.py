"""Where images may come from: rules, data URIs, and fetching from a host that means no good."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import qap_gguf as qap
from qap_gguf.errors import ConfigError, ImageError
from qap_gguf.vision import fetch as fetch_module
from qap_gguf.vision.fetch import fetch
from qap_gguf.vision.sources import SourceRules, decode_data_uri

WEB = "http:" + "//"


class Host(BaseHTTPRequestHandler):
    """Paths say what it does."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/ok":
            self.answer(200, {"Content-Length": "5"}, b"image")
        elif path == "/loop":
            self.answer(302, {"Location": "/loop"})
        elif path == "/hop":
            self.answer(302, {"Location": "/ok"})
        elif path.startswith("/hops/"):
            left = int(path.rpartition("/")[2])
            self.answer(302, {"Location": f"/hops/{left - 1}" if left > 1 else "/ok"})
        elif path.startswith("/bytes/"):
            self.answer(200, {}, bytes(int(path.rpartition("/")[2])))
        elif path == "/to-file":
            self.answer(302, {"Location": "file:///etc/passwd"})
        elif path == "/who":  # as hosts do that want to know who asks
            known = "qap_gguf/" in self.headers.get("User-Agent", "")
            self.answer(200 if known else 403, {"Content-Length": "5"}, b"image")
        elif path == "/short":
            self.answer(200, {"Content-Length": "50"}, b"x")
        elif path == "/drip":
            self.answer(200, {"Content-Length": "5000"})
            for _ in range(100):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
                time.sleep(0.05)
        else:
            self.answer(404, {})

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"{WEB}127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def get(url: str, timeout_s: float = 5.0) -> bytes:
    return fetch(url, max_bytes=1000, timeout_s=timeout_s, allow_private=True)


def test_fetching(host: str) -> None:
    assert get(f"{host}/ok") == b"image"
    assert get(f"{host}/hop?a=b") == b"image"
    assert get(f"{host}/who") == b"image"


@pytest.mark.parametrize(
    ("path", "words"),
    [("/loop", "redirects"), ("/to-file", "http or https"), ("/bytes/5000", "at most 1000"), ("/short", "cut off"),
     ("/none", "404"), ("/a b", "percent-encoded"), ("/\u00e9", "percent-encoded")],
)  # fmt: skip
def test_bodies_that_are_refused(host: str, path: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        get(host + path)


def test_both_sides_of_each_limit(host: str) -> None:
    """Bytes of a body, redirects, length of a URL."""
    assert len(get(f"{host}/bytes/1000")) == 1000
    assert get(f"{host}/hops/4") == b"image"
    url = f"{host}/ok?"
    assert get(url.ljust(4096, "a")) == b"image"
    for refused, words in (
        (f"{host}/bytes/1001", "at most 1000"),
        (f"{host}/hops/5", "more than 4 redirects"),
        (url.ljust(4097, "a"), "http or https"),
    ):
        with pytest.raises(ImageError, match=words):
            get(refused)


def test_a_host_that_drips(host: str) -> None:
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"too long|fetched"):
        get(f"{host}/drip", timeout_s=0.4)
    assert time.monotonic() - started < 3


def test_nothing_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for url in (f"{WEB}127.0.0.1:{port}/", f"{WEB}127.0.0.1:{port}/".replace("http", "https")):
        with pytest.raises(ImageError, match="fetched"):
            get(url)


PRIVATE = [
    "127.0.0.1", "localhost", "10.0.0.8", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fc00::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1",
    "2130706433", "0x7f.1", "127.1",
]  # fmt: skip


@pytest.mark.parametrize("name", PRIVATE)
def test_private_addresses(name: str) -> None:
    with pytest.raises(ImageError, match=r"public address|cannot resolve"):
        fetch(f"{WEB}{name}:9/latest", max_bytes=10, timeout_s=1)


#: IPv6 forms around an IPv4 address that this machine or a gateway may unwrap.
CARRIED = [
    "::7f00:1", "::127.0.0.1", "::ffff:0:7f00:1", "::ffff:7f00:1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
    "64:ff9b:1::7f00:1", "64:ff9b:1::808:808", "64:ff9b:1:7f00:0:100::", "2002:7f00:1::", "2002:a00:1::1",
    "2001:0:7f00:1::", "2001::5ef5:79fd:380e:2d5:80ff:fffe", "2001:0:808:808::f5ff:fffe",
    "2a00:1450:4001:800::5efe:a00:1", "2a00:1450:4001:800:200:5efe:a00:1", "::", "::1", "fe80::1%eth0", "fec0::1",
    "ff02::1", "100::1", "2001:db8::1", "0.0.0.0", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "none",
]  # fmt: skip


@pytest.mark.parametrize("address", CARRIED)
def test_addresses_inside_of_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(None, None, None, "", (address, 80))])
    with pytest.raises(ImageError, match="public address"):
        fetch(f"{WEB}example/", max_bytes=10, timeout_s=1)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2a00:1450:4001:800::200e", "2002:808:808::1"]
)
def test_public_addresses(address: str) -> None:
    assert fetch_module.is_public(address)


def test_slow_names_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver has no time limit of its own; each redirect may name another host."""

    def slow(*_: Any, **__: Any) -> list[Any]:
        time.sleep(3)
        return [(None, None, None, "", ("127.0.0.1", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    started = time.monotonic()
    with pytest.raises(ImageError, match="resolved in time"):
        get(f"{WEB}example/", timeout_s=0.3)
    assert time.monotonic() - started < 2


def test_raw_base64() -> None:
    """Told apart from a path, also where files are read; a file of such a name is still a file."""
    data = base64.b64encode(qap.packaged_model().sample.read_bytes()).decode()
    for rules in (SourceRules(), SourceRules(allow_files=False)):
        for text in (data, "/9j/" + data[4:], data[:100], data.replace("+", "-").replace("/", "_")):
            with pytest.raises(ImageError, match="data URI, got base64"):
                rules.load(text)
    with pytest.raises(ImageError, match="found none"):
        SourceRules().load("folder/of/pictures/" + "a" * 60 + ".png")


def test_a_file_with_a_name_like_base64(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 80)
    path.write_bytes(qap.packaged_model().sample.read_bytes())
    assert SourceRules().load(str(path)).shape == (192, 192, 3)


def test_a_name_with_one_private_address_among_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(*_: Any, **__: Any) -> list[Any]:
        return [(None, None, None, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with pytest.raises(ImageError, match=r"10\.0\.0\.1"):
        fetch("http://example/", max_bytes=10, timeout_s=1)


def test_a_redirect_into_the_private_network(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address passes as public; the redirect is judged like the first."""
    asked: list[bool] = []
    real = fetch_module._addresses

    def pretend(name: str, port: int, allow_private: bool, timeout_s: float) -> list[str]:
        asked.append(allow_private)
        return real(name, port, allow_private or len(asked) == 1, timeout_s)

    monkeypatch.setattr(fetch_module, "_addresses", pretend)
    with pytest.raises(ImageError, match="public address"):
        fetch(f"{host}/hop", max_bytes=100, timeout_s=5)
    assert asked == [False, False]


@pytest.mark.parametrize("url", ["http://", "http://[::1", "ftp://example/a", "http://example:99999/", "http:///x"])
def test_no_urls(url: str) -> None:
    with pytest.raises(ImageError, match="expected"):
        fetch(url, max_bytes=10, timeout_s=1)


def test_data_uris() -> None:
    assert decode_data_uri("data:image/png;base64,aGVs\nbG8=") == b"hello"
    assert decode_data_uri("data:text/plain,a%20b") == b"a b"
    for bad in ("data:image/png;base64", "data:;base64,a", "data:;base64,****", "data:;base64,\u00e9"):
        with pytest.raises(ImageError):
            decode_data_uri(bad)


def test_rules(tmp_path: Path, host: str) -> None:
    sample = qap.packaged_model().sample
    uri = "data:image/png;base64," + base64.b64encode(sample.read_bytes()).decode()
    strict = SourceRules(allow_files=False)
    assert strict.load(uri).shape == (192, 192, 3)
    assert SourceRules().load(str(sample)).shape == (192, 192, 3)
    for source in (str(sample), sample.as_uri(), sample, "relative.png", "file://elsewhere/a.png"):
        with pytest.raises(ImageError, match=r"not read here|of this machine"):
            strict.load(source)
    for url in (f"{host}/ok", "https://example/a.png", "HTTP://example/a.png"):
        with pytest.raises(ImageError, match="not fetched"):
            strict.load(url)
    with pytest.raises(ImageError, match="public"):
        SourceRules(allow_urls=True).load(f"{host}/ok")
    with pytest.raises(ImageError, match="picture"):  # fetched, and then it is none
        SourceRules(allow_urls=True, allow_private=True).load(f"{host}/ok")
    sources: list[Any] = [uri, sample, sample.read_bytes()]
    n_bytes = sample.stat().st_size
    for source in sources:
        assert SourceRules(max_bytes=n_bytes, max_pixels=192 * 192).load(source).shape == (192, 192, 3)
        with pytest.raises(ImageError, match=f"at most {n_bytes - 1} bytes"):
            SourceRules(max_bytes=n_bytes - 1).load(source)
        with pytest.raises(ImageError, match="at most 9000 bytes"):
            SourceRules(max_bytes=9000).load(source)  # told before a data URI is decoded
        with pytest.raises(ImageError, match="at most 36863 pixels"):
            SourceRules(max_pixels=192 * 192 - 1).load(source)
    with pytest.raises(ImageError, match=r"found none|cannot read"):
        SourceRules().load("a\x00b")
    with pytest.raises(ImageError, match="found none"):
        SourceRules().load(tmp_path)


@pytest.mark.parametrize("bad", [{"max_bytes": 0}, {"max_images": True}, {"timeout_s": 0}, {"allow_urls": 1}])
def test_bad_rules(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SourceRules(**bad)
