"""A server of files for tests: one that keeps to HTTP's ranges, and ways in which servers do not.

The first part of a path says how it behaves (the methods ``do_*_``), the rest names a file. It counts what it sends.
``/api/models`` and ``/owner/name/resolve`` are the few routes of a hub that huggingface_hub asks for.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEB = "http:" + "//"
_BLOCK = 1 << 16


@dataclass
class FarServer:
    """A server that runs.

    Attributes:
        url: its address.
        folder: of its files.
        blocks: sizes of the parts of files' bodies, each noted before it is written: whoever has read a whole body
            finds all of it here, and of one that was hung up on at most one block too many.
        asked: path and headers of each request.
        leads_to: the address of another server for ``/to``, and for the files of its hub.
        token: what its hub wants to know, None: nothing.
        gated: its hub lists files and gives none.
    """

    folder: Path
    url: str = ""
    blocks: list[int] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    leads_to: str = ""
    token: str | None = None
    gated: bool = False

    @property
    def sent(self) -> int:
        """Bytes of the bodies of files."""
        return sum(self.blocks)

    def paths(self) -> list[str]:
        """Paths of requests, in order."""
        return [path for path, _ in self.asked]


class _Handler(BaseHTTPRequestHandler):
    far: FarServer

    def do_GET(self) -> None:
        self.far.asked.append((self.path, dict(self.headers.items())))
        path = self.path.partition("?")[0]
        way, _, name = path.lstrip("/").partition("/")
        hub = re.fullmatch(r"/[\w.-]+/[\w.-]+/resolve/main/(.+)", path)
        try:
            if path.startswith("/api/models/"):
                self.list_files(path)
            elif hub is not None:
                self.resolve(hub[1])
            else:
                getattr(self, f"do_{way}_", self.do_none_)(name)
        except OSError:  # the other side had enough
            self.close_connection = True

    # --- a hub ---

    def list_files(self, path: str) -> None:
        if self.far.token is not None and self.headers.get("Authorization") != f"Bearer {self.far.token}":
            self.head(401, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})
        elif "/someone/tiny/" not in path:
            self.head(404, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})
        else:
            rows = [
                {"type": "file", "oid": "0" * 40, "size": file.stat().st_size, "path": file.name}
                for file in sorted(self.far.folder.iterdir())
            ]
            body = json.dumps(rows).encode()
            self.head(200, {"Content-Type": "application/json", "Content-Length": len(body)})
            self.wfile.write(body)

    def resolve(self, name: str) -> None:
        if self.far.gated:
            self.head(403, {"X-Error-Code": "GatedRepo", "Content-Length": "0"})
        else:
            self.head(302, {"Location": f"{self.far.leads_to}/ranges/{name}?signed=1", "Content-Length": "0"})

    # --- files ---

    def do_ranges_(self, name: str) -> None:
        self.answer_range(name)

    def do_star_(self, name: str) -> None:
        self.answer_range(name, total="*")

    def do_small_(self, name: str) -> None:
        self.answer_range(name, most=300_000)

    def do_generous_(self, name: str) -> None:
        self.answer_range(name, most=-1)

    def do_gzip_(self, name: str) -> None:
        self.answer_range(name, headers={"Content-Encoding": "gzip"})

    def do_short_(self, name: str) -> None:
        self.answer_range(name, cut=100)

    def do_elsewhere_(self, name: str) -> None:
        self.answer_range(name, shift=7)

    def do_bare_(self, name: str) -> None:
        self.answer_range(name, headers={"Content-Range": "rows 1-2/3"})

    def do_lies_(self, name: str) -> None:
        """Says that the file is shorter than it is."""
        self.answer_range(name, total=str(3 << 20))

    def do_changes_(self, name: str) -> None:
        self.answer_range(name, total=str((1 << 30) + len(self.far.asked)))

    def do_whole_(self, name: str) -> None:
        """Ignores ranges."""
        path = self.far.folder / name
        self.head(200, {"Content-Length": path.stat().st_size})
        self.send(path, 0, path.stat().st_size)

    def do_unsized_(self, name: str) -> None:
        path = self.far.folder / name
        self.head(200, {})
        self.send(path, 0, path.stat().st_size)

    def do_cut_(self, name: str) -> None:
        path = self.far.folder / name
        self.head(200, {"Content-Length": path.stat().st_size})
        self.send(path, 0, 1000)

    def do_page_(self, _name: str) -> None:
        self.head(200, {"Content-Type": "text/html; charset=utf-8", "Content-Length": "6"})
        self.wfile.write(b"<html>")

    def do_empty_(self, _name: str) -> None:
        self.head(200, {"Content-Length": "0"})

    def do_nothing_(self, _name: str) -> None:
        self.head(416, {"Content-Range": "bytes */0", "Content-Length": "0"})

    def do_status_(self, name: str) -> None:
        self.head(int(name), {"Content-Length": "0"})

    def do_silent_(self, _name: str) -> None:
        time.sleep(1.0)

    def do_drips_(self, name: str) -> None:
        self.head(206, {"Content-Range": f"bytes 0-99999/{100_000}", "Content-Length": "100000"})
        for _ in range(50):
            self.wfile.write(b"G")
            time.sleep(0.05)

    def do_to_(self, name: str) -> None:
        self.head(302, {"Location": f"{self.far.leads_to}/ranges/{name}", "Content-Length": "0"})

    def do_own_(self, name: str) -> None:
        self.head(307, {"Location": f"/ranges/{name}", "Content-Length": "0"})

    def do_hops_(self, name: str) -> None:
        left, _, file = name.partition("/")
        target = f"/hops/{int(left) - 1}/{file}" if int(left) > 1 else f"/ranges/{file}"
        self.head(301, {"Location": target, "Content-Length": "0"})

    def do_away_(self, name: str) -> None:
        scheme = {"file": "file:///etc/hosts", "http": f"{WEB}example/a"}[name]
        self.head(302, {"Location": scheme, "Content-Length": "0"})

    def do_none_(self, _name: str) -> None:
        self.head(404, {"Content-Length": "0"})

    def answer_range(
        self,
        name: str,
        *,
        total: str | None = None,
        most: int | None = None,
        cut: int = 0,
        shift: int = 0,
        headers: dict[str, str] | None = None,
    ) -> None:
        path = self.far.folder / name
        if not path.is_file():
            self.do_none_(name)
            return
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None
        begin, end = int(found[1]), min(int(found[2]) + 1, size)
        if begin >= size:
            self.do_nothing_(name)
            return
        if most is not None:
            end = size if most < 0 else min(end, begin + most)
        given = {
            "Content-Range": f"bytes {begin + shift}-{end - 1}/{size if total is None else total}",
            "Content-Length": end - begin,
        }
        self.head(206, given | (headers or {}))
        self.send(path, begin, end - cut)

    def send(self, path: Path, begin: int, end: int) -> None:
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end and (block := file.read(min(_BLOCK, end - begin))):
                self.far.blocks.append(len(block))
                self.wfile.write(block)
                begin += len(block)
        self.close_connection = True

    def head(self, status: int, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving_files(folder: Path) -> Iterator[FarServer]:
    """A server of the files in a folder, while the block runs."""
    far = FarServer(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"far": far}))
    server.daemon_threads = True
    far.url = far.leads_to = f"{WEB}127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield far
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
