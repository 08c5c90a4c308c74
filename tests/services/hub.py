"""A small Hugging Face hub: the endpoints that streaming a dataset asks for, over HTTP on this machine."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Datasets by name and commit, and what was asked of them.

    Attributes:
        files: (name, commit) -> path -> bytes.
        branches: (name, branch) -> commit.
        gated: names that want a token.
        token: the one that is accepted.
        served: path -> bytes sent, of files.
        asked: every request line.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.token = "hf_rightRightRight"
        self.served: dict[str, int] = {}
        self.asked: list[str] = []
        self.url = ""
        self.down = False

    def push(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit with these files; returns its hash."""
        text = repr(sorted(files.items())).encode()
        commit = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        self.files[name, commit] = files
        self.branches[name, branch] = commit
        return commit

    def commit_of(self, name: str, revision: str) -> str | None:
        revision = self.branches.get((name, revision), revision)
        return revision if (name, revision) in self.files else None

    def knows(self, name: str) -> bool:
        return any(name == known for known, _ in self.files)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _children(entries: list[dict[str, Any]], below: str) -> list[dict[str, Any]]:
    """What lies directly in a folder."""
    prefix = f"{below}/" if below else ""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if str(entry["path"]).startswith(prefix):
            first, *deeper = str(entry["path"])[len(prefix) :].split("/")
            path = prefix + first
            found[path] = {"type": "directory", "path": path, "size": 0, "oid": "0"} if deeper else entry
    return list(found.values())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.hub.down:
            return self._send(503, b"", {}, with_body)
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(.*))?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None:
            return self._refuse(404, "EntryNotFound", with_body)
        name = found[1]
        revision = (api[3] if api else file[2] if file else None) or "main"
        if not self.hub.knows(name):
            return self._refuse(401, "RepoNotFound", with_body)
        # the hub tells of a gated dataset that it is there, and keeps its files
        barred = self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        if name in self.hub.gated and barred and (api is None or api[2] in ("tree", "paths-info")):
            return self._refuse(401, "GatedRepo", with_body)
        commit = self.hub.commit_of(name, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", with_body)
        files = self.hub.files[name, commit]
        if file:
            return self._file(files, file[3], commit, with_body)
        assert api is not None
        entries = [
            {"type": "file", "path": p, "size": len(data), "oid": _oid(data)} for p, data in files.items()
        ]
        if api[2] == "tree":
            reply: Any = _children(entries, api[4].strip("/"))
        elif api[2] == "paths-info":
            wanted = json.loads(body)["paths"]
            reply = [entry for entry in entries if entry["path"] in wanted]
        else:
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            reply = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        return self._send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"}, with_body)

    def _file(self, files: dict[str, bytes], path: str, commit: str, with_body: bool) -> None:
        if path not in files:
            return self._refuse(404, "EntryNotFound", with_body)
        data, status = files[path], 200
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if with_body:
            self.hub.served[path] = self.hub.served.get(path, 0) + len(data)
        return self._send(status, data, headers, with_body)

    def _refuse(self, status: int, code: str, with_body: bool) -> None:
        headers = {
            "X-Error-Code": code,
            "X-Error-Message": f"{code} at https://signed?X-Amz-Signature=secret",
        }
        self._send(status, json.dumps({"error": code}).encode(), headers, with_body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves a hub on a free port of this machine."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
