"""A static web server on loopback: with ranges, without them, failing now and then, or gone."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Site(ThreadingHTTPServer):
    """The files of a folder."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, *, ranges: bool = True, failing: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.folder, self.ranges, self.failing = folder, ranges, failing
        self.count, self.gone, self.lock = 0, False, threading.Lock()
        self.methods: list[str] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client may go away."""

    def close(self) -> None:
        self.gone = True
        self.shutdown()
        self.server_close()


class Page(BaseHTTPRequestHandler):
    """GET and HEAD of files."""

    protocol_version = "HTTP/1.1"
    server: Site

    def fails(self) -> bool:
        """Count a request; every tenth fails, in turn with an error and with silence."""
        with self.server.lock:
            self.server.count += 1
            self.server.methods.append(self.command)
            number = self.server.count if self.server.failing else 1
        if self.server.gone or number % 20 == 10:
            self.close_connection = True
            return True
        if number % 20 == 0:
            self.answer(500, b"")
            return True
        return False

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self) -> None:
        if not self.fails():
            self.give(self.server.folder / unquote(self.path).lstrip("/"))

    def give(self, path: Path) -> None:
        """Answer with a file."""
        if not path.is_file():
            self.answer(404, b"")
            return
        self.give_bytes(path.read_bytes())

    def give_bytes(self, data: bytes, **headers: str) -> None:
        """Answer with bytes, or the range of them that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked and self.server.ranges:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            where = f"bytes {first}-{last}/{len(data)}"
            self.answer(206, data[first : last + 1], Content_Range=where, **headers)
        else:
            self.answer(200, data, **headers)

    do_GET = do_HEAD = _file  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
