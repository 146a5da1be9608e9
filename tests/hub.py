"""A stand-in for the Hugging Face Hub on loopback: the few requests that reading and pushing make.

It keeps data sets in memory: each commit is a mapping of paths to bytes. Files above `LARGE` bytes
go by LFS, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.web import Page, Site

LARGE = 500

Files = dict[str, bytes]


class Hub(Site):
    """Data sets and their commits. Requests need `token`, where it is given."""

    def __init__(self, *, failing: bool = False, token: str = "") -> None:
        self.token, self.puts, self.commits = token, 0, 0
        self.repos: dict[str, dict[str, str]] = {}
        """Data set → branch → commit."""
        self.history: dict[str, Files] = {}
        self.blobs: Files = {}
        self.changing = threading.Lock()
        self.on_commit: Callable[[int], None] = lambda number: None
        super().__init__(None, failing=failing)  # type: ignore[arg-type]
        self.RequestHandlerClass = HubPage

    def files(self, repo: str, revision: str = "main") -> Files:
        branches = self.repos[repo]
        return self.history[branches.get(revision, revision)]

    def add(self, repo: str, branch: str, files: Files) -> str:
        """Add a commit; return its name."""
        commit = hashlib.sha1(f"{repo} {len(self.history)}".encode()).hexdigest()
        self.history[commit] = files
        self.repos.setdefault(repo, {})[branch] = commit
        return commit


def entry(path: str, data: bytes) -> dict[str, Any]:
    """Return what the Hub says of a file."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if len(data) > LARGE:
        sha = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 130}
    return found


class HubPage(Page):
    """The requests, by their paths."""

    server: Hub

    def say(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, code: int, error: str) -> None:
        self.answer(code, b"", X_Error_Code=error, X_Error_Message=error)

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fails():
            return
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self.refuse(401, "RepoNotFound")
            return
        parts = urlsplit(self.path)
        path = parts.path
        for pattern, method in PATHS.items():
            if found := re.fullmatch(pattern, path):
                repo = found["repo"] if "repo" in found.groupdict() else None
                if repo is not None and repo not in self.server.repos:
                    self.refuse(404, "RepoNotFound")
                    return
                method(self, found, body, parse_qs(parts.query))
                return
        self.answer(501, path.encode())

    def at(self, found: re.Match[str]) -> Files | None:
        try:
            return self.server.files(found["repo"], unquote(found["rev"]))
        except KeyError:
            self.refuse(404, "RevisionNotFound")
            return None

    def create(self, found: re.Match[str], body: bytes, query: Any) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        made = json.dumps({"url": f"{self.server.url}/datasets/{repo}", "id": repo}).encode()
        if repo in self.server.repos:
            self.answer(409, made)
            return
        self.server.add(repo, "main", {".gitattributes": b"*.bin lfs"})
        self.answer(200, made)

    def info(self, found: re.Match[str], body: bytes, query: Any) -> None:
        if self.at(found) is not None:
            branches, rev = self.server.repos[found["repo"]], unquote(found["rev"])
            self.say({"id": found["repo"], "sha": branches.get(rev, rev)})

    def branch(self, found: re.Match[str], body: bytes, query: Any) -> None:
        branches = self.server.repos[found["repo"]]
        if found["rev"] in branches:
            self.answer(409, b"{}")
        else:
            branches[found["rev"]] = branches["main"]
            self.answer(200, b"{}")

    def tree(self, found: re.Match[str], body: bytes, query: Any) -> None:
        files, folder = self.at(found), unquote(found["path"]) + "/"
        if files is None:
            return
        inside = {path: data for path, data in files.items() if path.startswith(folder)}
        if not inside:
            self.refuse(404, "EntryNotFound")
            return
        listed = [entry(path, data) for path, data in inside.items()]
        if query.get("recursive", [""])[0].lower() != "true":
            names = {path.removeprefix(folder).partition("/")[0] for path in inside}
            listed = [item for item in listed if item["path"].removeprefix(folder) in names]
            plain = {item["path"].removeprefix(folder) for item in listed}
            listed += [
                {"type": "directory", "path": folder + name, "oid": "0" * 40}
                for name in sorted(names - plain)
            ]
        self.say(listed)

    def paths(self, found: re.Match[str], body: bytes, query: Any) -> None:
        files = self.at(found)
        if files is not None:
            asked = parse_qs(body.decode())["paths"]
            self.say([entry(path, files[path]) for path in asked if path in files])

    def preupload(self, found: re.Match[str], body: bytes, query: Any) -> None:
        self.say(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def batch(self, found: re.Match[str], body: bytes, query: Any) -> None:
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.blobs:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        self.say({"transfer": "basic", "objects": objects})

    def put_blob(self, found: re.Match[str], body: bytes, query: Any) -> None:
        assert hashlib.sha256(body).hexdigest() == found["oid"]
        self.server.puts += 1
        self.server.blobs[found["oid"]] = body
        self.answer(200, b"")

    def commit(self, found: re.Match[str], body: bytes, query: Any) -> None:
        with self.server.changing:
            files, branch = dict(self.server.files(found["repo"], found["rev"])), found["rev"]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
            oid = self.server.add(found["repo"], unquote(branch), files)
            self.server.commits += 1
            self.server.on_commit(self.server.commits)
        url = f"{self.server.url}/datasets/{found['repo']}/commit/{oid}"
        self.say({"commitUrl": url, "commitOid": oid, "success": True})

    def validate(self, found: re.Match[str], body: bytes, query: Any) -> None:
        assert "TODO" in json.loads(body)["content"]
        self.say({"errors": [], "warnings": []})

    def resolve(self, found: re.Match[str], body: bytes, query: Any) -> None:
        files = self.at(found)
        if files is None:
            return
        path = unquote(found["path"])
        if path in files:
            self.give_bytes(files[path], X_Repo_Commit=found["rev"], ETag='"0"')
        else:
            self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815


REPO = r"(?P<repo>[^/]+/[^/]+)"
PATHS: dict[str, Callable[..., None]] = {
    "/api/repos/create": HubPage.create,
    "/api/validate-yaml": HubPage.validate,
    f"/api/datasets/{REPO}/revision/(?P<rev>[^/]+)": HubPage.info,
    f"/api/datasets/{REPO}/branch/(?P<rev>[^/]+)": HubPage.branch,
    f"/api/datasets/{REPO}/tree/(?P<rev>[^/]+)/(?P<path>.+)": HubPage.tree,
    f"/api/datasets/{REPO}/paths-info/(?P<rev>[^/]+)": HubPage.paths,
    f"/api/datasets/{REPO}/preupload/(?P<rev>[^/]+)": HubPage.preupload,
    f"/api/datasets/{REPO}/commit/(?P<rev>[^/]+)": HubPage.commit,
    f"/datasets/{REPO}.git/info/lfs/objects/batch": HubPage.batch,
    "/lfs/(?P<oid>.+)": HubPage.put_blob,
    f"/datasets/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)": HubPage.resolve,
}
