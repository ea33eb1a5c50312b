"""The first bytes of a file of the web, as many as its reader asks for.

HTTP ranges, each as long as what is there already; a server that ignores them is read no further than needed. The
standard library does the rest: proxies, redirects, TLS. An address comes from whoever gives the command, so private
networks are allowed; plain http is for this machine, or where it is asked for.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any, Final

from qap_gguf import _core
from qap_gguf.arguments import one_line
from qap_gguf.errors import ModelFileError

__all__ = ["WebFile", "is_url", "shown"]

_FIRST: Final = 1 << 20  # bytes of the first range
_BLOCK: Final = 1 << 16
_REDIRECTS: Final = 5
_SILENCE_S: Final = 30.0  # that a server may take for a sign of life
_TOTAL_S: Final = 300.0  # that one file may take
_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_CURES: Final = {
    401: "it wants a login: give the hub's id after hf auth login, or fetch the file",
    403: "it gives no access: accept the model's terms on the hub, hf auth login, and give the hub's id",
    404: "check the address",
    410: "check the address",
    429: "wait, and try again",
}


def is_url(text: str) -> bool:
    """Whether a text is the address of a file of the web, not a path.

    Example:
        >>> is_url("https://example/a.gguf"), is_url("models/a.gguf")
        (True, False)
    """
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def shown(url: str) -> str:
    """An address without what may be secret in it: its query.

    Example:
        >>> shown("https://example/a.gguf?token=1")
        'https://example/a.gguf'
    """
    return re.split(r"[?#]", url, maxsplit=1)[0]


def _here(url: str) -> bool:
    """The address is one of this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are errors, which WebFile follows by itself: each address is checked."""

    def redirect_request(self, *_: Any) -> None:
        return None


class WebFile:
    """A file of the web, whose beginning is read.

    Args:
        url: its address.
        name: what messages call it; None is the address without its query.
        headers: of each request, such as a login.
        allow_http: plain http from everywhere, not only from this machine.
        most: bytes from the beginning that are read at the most.

    Attributes:
        n_read: bytes that were read so far.
        size: bytes of the file; None where the server does not tell, or did not yet.
        kind: the kind of file that the server says it is, "" without.

    Raises:
        ModelFileError: another address than https, or http of this machine.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        headers: Mapping[str, str] | None = None,
        allow_http: bool = False,
        most: int = 64 << 20,
    ) -> None:
        self.name = shown(url) if name is None else name
        self.n_read = 0
        self.size: int | None = None
        self.kind = ""
        self._url = url
        self._allow_http = allow_http
        self._most = most
        self._until = time.monotonic() + _TOTAL_S
        self._data = bytearray()
        self._ended = False
        self._stream: HTTPResponse | None = None  # of a server that ignores ranges
        self._headers = {
            "User-Agent": f"qap_gguf/{_core.__version__}",
            **(headers or {}),
            "Accept-Encoding": "identity",
        }
        self._check_address(url)
        self._opener = urllib.request.build_opener(_NoRedirects)

    def _check_address(self, url: str) -> None:
        """Refuse an address that this file must not be read from."""
        try:
            parts = urllib.parse.urlsplit(url)
            fine = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            fine = False
        if not fine or parts.scheme not in ("http", "https") or any(not " " < letter <= "~" for letter in url):
            raise ModelFileError(f"expected a percent-encoded https address, got {shown(url)[:200]!r}; check it")
        allowed = self._allow_http or (_here(url) and _here(self._url))
        if parts.scheme == "http" and not allowed:
            raise ModelFileError(
                f"expected https, got the address {shown(url)[:200]}; use https, or allow plain http (--allow-http)"
            )

    def more(self, n_bytes: int) -> bytes:
        """Its first `n_bytes` or more; fewer where it ends, or where `most` is.

        Raises:
            ModelFileError: the server does not give them.
        """
        needed = min(n_bytes, self._most)
        with self._in_one_line():
            while len(self._data) < needed and not self._ended:
                self._extend(min(max(needed, _FIRST, 2 * len(self._data)), self._most))
        return bytes(self._data)

    def close(self) -> None:
        """Hang up."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _extend(self, target: int) -> None:
        begin = len(self._data)
        if self._stream is None:
            wanted = f"bytes={begin}-{(target if self.size is None else min(target, self.size)) - 1}"
            response = self._ask(wanted)
            if response is None:
                self._ended = True  # nothing lies there
                return
            if response.status == 206:
                with response:
                    self._take_range(response, begin, target)
                return
            self._take_all(response)
        self._take(self._stream, target)
        if len(self._data) < target:
            self._check_whole(self.size)
            self._ended = True

    def _ask(self, wanted: str) -> HTTPResponse | None:
        """The answer to a request for a range; None where the file has no bytes there."""
        url, headers = self._url, {**self._headers, "Range": wanted}
        for _ in range(1 + _REDIRECTS):
            left = max(0.1, min(_SILENCE_S, self._until - time.monotonic()))
            try:
                response: HTTPResponse = self._opener.open(urllib.request.Request(url, headers=headers), timeout=left)
                return response
            except urllib.error.HTTPError as err:
                err.close()
                if err.code == 416:
                    return None
                leads_to = err.headers.get("Location")
                if err.code not in (301, 302, 303, 307, 308) or not leads_to:
                    raise
            following = urllib.parse.urljoin(url, leads_to)
            self._check_address(following)
            if _origin(following) != _origin(url):  # a login goes no further than the server that it is for
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            url = following
        raise ModelFileError(f"expected a file at {self.name}, got {_REDIRECTS} redirects and more; check the address")

    def _take_range(self, response: HTTPResponse, begin: int, target: int) -> None:
        self._check_plain(response)
        given = response.headers.get("Content-Range", "")
        found = _RANGE.fullmatch(given)
        if found is None or int(found[1]) != begin or int(found[2]) < begin:
            raise ModelFileError(
                f"expected bytes from {begin} on of {self.name}, the server gives {given[:80]!r}; fetch the file"
            )
        size = None if found[3] == "*" else int(found[3])
        if size is not None and int(found[2]) >= size:
            raise ModelFileError(f"expected a range within {size} bytes of {self.name}, got {given!r}; fetch the file")
        if None not in (size, self.size) and size != self.size:
            raise ModelFileError(
                f"expected {self.size} bytes at {self.name} as before, got {size}: it changed meanwhile; try again"
            )
        self.size = size or self.size
        end = min(int(found[2]) + 1, target)
        self._take(response, end)
        self._check_whole(end)
        self._ended = end == self.size

    def _take_all(self, response: HTTPResponse) -> None:
        """Begin with a server that gives the whole file, whatever it is asked for."""
        self._stream = response
        self._check_plain(response)
        if response.status != 200:
            raise ModelFileError(f"expected a file at {self.name}, got status {response.status}; check the address")
        self._data.clear()
        length = response.headers.get("Content-Length", "")
        self.size = int(length) if length.isdecimal() else None

    def _check_plain(self, response: HTTPResponse) -> None:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise ModelFileError(
                f"expected {self.name} as it is, the server sends it as {encoding[:20]!r}; fetch the file"
            )
        self.kind = response.headers.get("Content-Type", "").split(";")[0].strip()[:60]

    def _take(self, response: HTTPResponse | None, target: int) -> None:
        while response is not None and len(self._data) < target:
            if time.monotonic() >= self._until:
                raise ModelFileError(
                    f"expected the beginning of {self.name} within {_TOTAL_S:.0f} s, got {len(self._data)} bytes "
                    "by then; fetch the file"
                )
            block = response.read1(min(_BLOCK, target - len(self._data)))
            if not block:
                return
            self._data += block
            self.n_read += len(block)

    def _check_whole(self, end: int | None) -> None:
        if end is not None and len(self._data) < end:
            raise ModelFileError(f"expected {end} bytes of {self.name}, got {len(self._data)}: cut off; try again")

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except ModelFileError:
            raise
        except urllib.error.HTTPError as err:
            cure = _CURES.get(err.code, "try again later")
            raise ModelFileError(
                f"expected a file at {self.name}, the server answers with status {err.code}; {cure}"
            ) from err
        except (OSError, http.client.HTTPException, ValueError) as err:
            why = getattr(err, "reason", None) or err
            raise ModelFileError(
                f"expected a file at {self.name}, it cannot be read ({one_line(why)[:200] or type(err).__name__}); "
                "check the address and the connection"
            ) from err
