"""Images from the web, for whoever allows it: bounded in bytes and time, and never from inside a private network.

A server that fetches what a stranger names could be sent to its own network (server-side request forgery). So: the
name is resolved here, all its addresses must be public (:func:`is_public`), and the connection is made to the address
that was checked, not to the name once more. A redirect is followed by hand and checked in the same way.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse

from qap_gguf import _core
from qap_gguf.errors import ImageError

_MAX_REDIRECTS = 4
_MAX_URL = 4096
_BLOCK = 1 << 16
#: Hosts refuse requests that do not say who asks.
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": f"qap_gguf/{_core.__version__}"}

#: The part of IPv6 that is given out; the local forms, old and new, that carry an IPv4 address are outside of it.
_GIVEN_OUT = ipaddress.IPv6Network("2000::/3")
#: Gateways send what goes here on to the IPv4 address in the last 32 bits.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP, _ISATAP_MASK = 0x00005EFE, 0xFCFFFFFF  # the 32 bits before them; two bits say who gave the address
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _stands_for(address: _Address) -> list[_Address]:
    """All addresses that a packet to this one may end at: those that it carries, and where that is none, itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _NAT64:
        return [last]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    found: list[_Address] = [address]
    if address.sixtofour is not None:
        found.append(address.sixtofour)
    if address.teredo is not None:
        found += address.teredo
    if int(address) >> 32 & _ISATAP_MASK == _ISATAP:
        found.append(last)
    return found


def is_public(address: str) -> bool:
    """Whether an address, and each that it carries within itself, belongs to the public internet.

    Example:
        >>> [is_public(text) for text in ("8.8.8.8", "127.0.0.1", "::1", "::ffff:0:7f00:1", "2002:a00:1::")]
        [True, False, False, False, False]
    """
    try:
        found = _stands_for(ipaddress.ip_address(address.split("%", 1)[0]))
    except ValueError:
        return False
    return all(one.is_global and not one.is_multicast and (one.version == 4 or one in _GIVEN_OUT) for one in found)


def _resolve(host: str, port: int, timeout_s: float) -> list[str]:
    """Addresses of a host; the system's resolver knows no time limit, so a thread waits for it that may be left."""
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put([str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except Exception as err:
            answers.put(err)

    threading.Thread(target=ask, name="qap-resolve", daemon=True).start()
    try:
        found = answers.get(timeout=max(timeout_s, 0.0))
    except queue.Empty:
        raise ImageError(f"image: the name {host[:100]!r} was not resolved in time; send the image's bytes") from None
    if isinstance(found, (OSError, UnicodeError)):
        raise ImageError(f"image: cannot resolve the host {host[:100]!r} ({found}); check the URL") from found
    if isinstance(found, Exception):
        raise found
    return sorted(set(found), key=lambda text: ":" in text)  # IPv4 first: it is routed everywhere


def _addresses(host: str, port: int, allow_private: bool, timeout_s: float) -> list[str]:
    found = _resolve(host, port, timeout_s)
    for text in found:
        if not allow_private and not is_public(text):
            raise ImageError(
                f"image: expected a public address, {host[:100]!r} leads to {text}; send the image's bytes"
            )
    return found


class _Connection(http.client.HTTPConnection):
    """Speaks to a checked address and names the host in the request, for TLS too."""

    def __init__(self, parts: urllib.parse.SplitResult, addresses: list[str], timeout: float) -> None:
        host, secure = parts.hostname or "", parts.scheme == "https"
        super().__init__(host, parts.port or (443 if secure else 80), timeout=timeout)
        self._addresses = addresses
        self._tls = ssl.create_default_context() if secure else None
        self._name = host
        self.default_port = 443 if secure else 80  # so that the Host header names no port where none is needed
        self._live: socket.socket | None = None

    def hang_up(self) -> None:
        """End the transfer from another thread: a host that drips bytes never runs into a socket's own timeout."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        failures: list[str] = []
        for address in self._addresses:
            try:
                self._live = self.sock = socket.create_connection((address, self.port), self.timeout)
                if self._tls is not None:
                    tls = self._tls.wrap_socket(self.sock, server_hostname=self._name, do_handshake_on_connect=False)
                    self._live = self.sock = tls
                    tls.do_handshake()
                return
            except OSError as err:
                failures.append(str(err))
        raise OSError("; ".join(failures))


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError as err:
        raise ImageError(f"image: expected a URL, got {url[:80]!r} ({err}); check it") from err
    if len(url) > _MAX_URL or parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine:
        raise ImageError(f"image: expected an http or https URL, got {url[:80]!r}; check it")
    if any(ord(letter) <= 32 or ord(letter) > 126 for letter in url):
        raise ImageError(f"image: expected a percent-encoded URL, got {url[:80]!r}; encode spaces and other letters")
    return parts


def fetch(url: str, *, max_bytes: int, timeout_s: float, allow_private: bool = False) -> bytes:
    """The body behind an http or https URL.

    Args:
        url: the address, percent-encoded.
        max_bytes: largest body; more is an error, not a cut.
        timeout_s: seconds for all of it, names and redirects included.
        allow_private: also addresses that are not public.

    Raises:
        ImageError: not allowed, not to be had, too large or too slow.
    """
    until = time.monotonic() + timeout_s
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _split(url)
        addresses = _addresses(parts.hostname or "", parts.port or 80, allow_private, until - time.monotonic())
        left = max(0.1, until - time.monotonic())
        connection = _Connection(parts, addresses, left)
        watch = threading.Timer(left, connection.hang_up)
        watch.daemon = True
        watch.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers=_HEADERS)
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                url = urllib.parse.urljoin(url, response.getheader("Location", ""))
                continue
            if response.status != 200:
                raise ImageError(f"image: the URL answers with status {response.status}; check it")
            return _read(response, max_bytes, until)
        except (OSError, http.client.HTTPException) as err:
            why = " ".join(str(err).split())[:200] or type(err).__name__
            raise ImageError(f"image: the URL cannot be fetched ({why}); check it") from err
        finally:
            watch.cancel()
            connection.close()
    raise ImageError(f"image: more than {_MAX_REDIRECTS} redirects; give the final URL")


def _read(response: http.client.HTTPResponse, max_bytes: int, until: float) -> bytes:
    body = bytearray()
    while block := response.read1(_BLOCK):
        body += block
        if len(body) > max_bytes:
            raise ImageError(f"image: expected at most {max_bytes} bytes, the URL sends more; send a smaller file")
    announced = response.getheader("Content-Length")
    if time.monotonic() >= until or (announced is not None and announced.isdigit() and len(body) < int(announced)):
        raise ImageError("image: the URL's transfer was cut off or took too long; send the image's bytes")
    return bytes(body)
