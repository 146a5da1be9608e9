"""A real S3 server on loopback: moto's, in a process of its own.

Before it stands a proxy that answers every tenth request with an error or hangs up.
"""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Flaky(BaseHTTPRequestHandler):
    """Pass requests on; every tenth fails, in turn with an error and with silence."""

    protocol_version = "HTTP/1.1"
    target = 0
    count = 0
    lock = threading.Lock()

    def _pass(self) -> None:
        with Flaky.lock:
            Flaky.count += 1
            number = Flaky.count
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if number % 20 == 0:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if number % 20 == 10:
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", Flaky.target, timeout=30)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
        except OSError:  # the server is gone: so is the answer
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data)
        upstream.close()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Server:
    """A moto process and the proxy before it."""

    def __init__(self) -> None:
        self.port, self.flaky = free_port(), free_port()
        words = ["-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p"]
        self.process = subprocess.Popen(
            [sys.executable, *words, str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        Flaky.target = self.port
        self.proxy = ThreadingHTTPServer(("127.0.0.1", self.flaky), Flaky)
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("PUT", "/bucket")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("moto does not answer")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.proxy.shutdown()
        self.proxy.server_close()
