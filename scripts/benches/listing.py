"""An S3 server of many small objects, for measuring what listing and opening cost.

It answers what a reader asks (lists of 1,000 keys, whole objects, whether there is one), each
answer after the latency of a store in the same region. Objects that only have to be there are names
without content.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
"""Keys of one answer, as in S3."""

LATENCY = 0.03
"""Seconds before an answer."""

WHEN = "2026-01-01T00:00:00.000Z"


class Store(BaseHTTPRequestHandler):
    """A bucket: names in order, and the content of those that have any."""

    protocol_version = "HTTP/1.1"
    names: list[str]
    content: Mapping[str, bytes]
    requests = 0

    def do_GET(self) -> None:
        """Answer with a page of a list, or an object."""
        asked = parse_qs(urlsplit(self.path).query)
        if "list-type" in asked:
            self._send(200, page(self.names, {name: v[0] for name, v in asked.items()}))
        else:
            self._send(200 if self._there else 404, self.content.get(self._name, b""))

    def do_HEAD(self) -> None:
        """Answer whether there is an object."""
        self._send(200 if self._there else 404, b"")

    @property
    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]

    @property
    def _there(self) -> bool:
        at = bisect_left(self.names, self._name)
        return self.names[at : at + 1] == [self._name]

    def _send(self, code: int, data: bytes) -> None:
        time.sleep(LATENCY)
        type(self).requests += 1
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"x"')
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def page(names: list[str], asked: Mapping[str, str]) -> bytes:
    """Return the XML of one page of a list (ListObjectsV2)."""
    prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
    at = bisect_left(names, prefix)
    if after := asked.get("continuation-token") or asked.get("start-after"):
        at = max(at, bisect_right(names, after))
    keys: list[str] = []
    folders: dict[str, None] = {}
    last = ""
    while at < len(names) and names[at].startswith(prefix) and len(keys) + len(folders) < PAGE:
        rest = names[at][len(prefix) :]
        if delimiter and delimiter in rest:
            folder = prefix + rest.partition(delimiter)[0] + delimiter
            folders[folder] = None
            last = folder[:-1] + chr(ord(delimiter) + 1)
            at = bisect_left(names, last)
        else:
            keys.append(names[at])
            last = names[at]
            at += 1
    more = at < len(names) and names[at].startswith(prefix)
    token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
    entry = f"<LastModified>{WHEN}</LastModified><ETag>x</ETag><Size>0</Size>"
    text = "".join(f"<Contents><Key>{escape(key)}</Key>{entry}</Contents>" for key in keys)
    text += "".join(
        f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders
    )
    return (
        f'<?xml version="1.0"?><ListBucketResult><Name>b</Name><Prefix>{escape(prefix)}</Prefix>'
        f"<KeyCount>{len(keys) + len(folders)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{text}</ListBucketResult>"
    ).encode()


@contextmanager
def serving(
    names: Iterable[str], content: Mapping[str, bytes]
) -> Iterator[tuple[str, type[Store]]]:
    """Serve a bucket; yield the address and the class that counts its requests."""
    bucket = type("Bucket", (Store,), {"names": sorted(names), "content": content})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bucket)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bucket
    finally:
        server.shutdown()
        server.server_close()
