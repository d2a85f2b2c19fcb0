"""A small server that speaks the protocol of the Hugging Face hub, and huggingface_hub pointed at it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Repository:
    """Files by commit; `revisions` names commits. `denied` is an error code of the hub for everyone without the token."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    denied: str = ""

    def add(self, files: dict[str, bytes], revision: str = "main") -> str:
        """A new commit of `files`, which `revision` names; returns its hash."""
        content = json.dumps([[name, hashlib.sha1(data).hexdigest()] for name, data in sorted(files.items())])
        commit = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.revisions[revision] = commit
        return commit

    def commit_of(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.revisions.get(revision)


@dataclass
class Hub:
    """The state of a running server: its repositories, the requests it received, and how it misbehaves."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)  # (method, path) in order
    ranges: list[str] = field(default_factory=list)  # Range headers of downloads
    cut_after: int = 0  # bytes after which the next long download breaks off; 0 for none
    token: str = ""  # that opens denied repositories and uploads
    fails_with: int = 0  # status of every answer

    def add(self, name: str, folder: Path, more: dict[str, bytes] | None = None) -> str:
        """A repository with the files of `folder`; returns the commit."""
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repositories.setdefault(name, Repository()).add(files | (more or {}))

    def downloaded(self) -> set[str]:
        """Paths inside repositories of the files that were sent."""
        return {
            path.split("/resolve/")[1].partition("/")[2]
            for method, path in self.seen
            if method == "GET" and "/resolve/" in path
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(length)
        url = urllib.parse.urlsplit(self.path)
        path = url.path
        self.hub.seen.append((self.command, urllib.parse.unquote(path)))
        if self.hub.fails_with:
            return self._json({"error": "out of order"}, self.hub.fails_with)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            owner, name, action, *rest = [*parts[2:], ""] if len(parts) > 3 else ["", "", ""]
            return self._api(f"{owner}/{name}", action, [part for part in rest if part], body)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._json({"error": "unknown path"}, 404)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _may(self) -> bool:
        return bool(self.hub.token) and self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _found(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(401, "RepoNotFound")
        elif repository.denied and not self._may():
            self._error(403, repository.denied)
        elif (commit := repository.commit_of(revision)) is None:
            self._error(404, "RevisionNotFound")
        else:
            return repository, commit
        return None

    def _api(self, name: str, action: str, rest: list[str], body: bytes) -> None:
        if action in ("preupload", "commit"):
            return self._upload(name, action, rest[0], body)
        found = self._found(name, rest[0] if action in ("revision", "tree") else "main")
        if found is None:
            return None
        files = found[0].commits[found[1]]
        if action == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self._json(listed)
        return self._json({"id": name, "sha": found[1], "siblings": [{"rfilename": path} for path in files], "tags": []})

    def _create(self, asked: dict) -> None:
        if not self._may():
            return self._error(401, "")
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.hub.repositories:
            return self._json({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
        self.hub.repositories[name] = Repository()
        self.hub.repositories[name].add({})
        return self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def _upload(self, name: str, action: str, revision: str, body: bytes) -> None:
        if not self._may():
            return self._error(401, "")
        if action == "preupload":
            files = json.loads(body)["files"]
            return self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        repository = self.hub.repositories[name]
        files = dict(repository.commits[repository.commit_of(revision) or ""])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = repository.add(files, revision)
        return self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        data = found[0].commits[found[1]].get(path)
        if data is None:
            return self._error(404, "EntryNotFound")
        first = 0
        if (asked := self.headers.get("Range")) and self.command == "GET":
            self.hub.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", found[1])
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "GET":
            if self.hub.cut_after and len(data) - first > self.hub.cut_after:
                first, data, self.hub.cut_after = first, data[: first + self.hub.cut_after], 0
                self.close_connection = True
            self.wfile.write(data[first:])

    def _error(self, status: int, code: str) -> None:
        self._json({"error": code}, status, code)

    def _json(self, content, status: int = 200, code: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def running(cache: Path, monkeypatch):
    """A hub in a thread, that huggingface_hub of this process asks; its cache is the folder `cache`."""
    import huggingface_hub.constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
