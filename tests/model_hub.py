"""A model hub on this machine, for what ``huggingface_hub`` asks of the real one: which commit a
revision is, what files it has, and the files themselves.

As strict as the real one: an unknown path is a 404 with the code that the real one gives, files
are named by the commit, small ones come from the hub and large ones by a redirect to storage that
takes no token, and of a gated repo everybody sees the list but only who may reads the files.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "krea/Krea-2-Turbo"
BESIDE = {"turbo.safetensors": b"\0" * 9999, "images/fox.png": b"\0" * 5000, "README.md": b"# K"}
"""What lies in the released repo beside the parts, the weights as one file among it."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 4096
"""Bytes from which on a file lies in storage."""


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@dataclass
class ModelHub:
    """One repo and what was asked of it.

    Attributes:
        repo: its id.
        files: by path.
        commits: by branch or tag.
        gated: whether files need `token`, on an account that has accepted the licence.
        token: that lets in.
        status: that answers everything, such as 503; 0 for none.
        fetched: path of each file whose content was read, in order.
        refused: what it does not know of.
    """

    repo: str
    files: dict[str, bytes]
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: bool = False
    token: str = "hf_good"
    status: int = 0
    fetched: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def serving(self) -> "Iterator[ModelHub]":
        """Answer at `url`."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: ModelHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        path = unquote(url.path)
        if hub.status:
            return self._error(hub.status, "", "not now")
        authorization = self.headers.get("Authorization")
        if path.startswith("/storage/"):
            # Signed for one file; with a token of the hub the real one answers 400.
            if authorization is not None:
                return self._error(400, "", "no Authorization is taken here")
            return self._content(path.removeprefix("/storage/"))
        if authorization not in (None, f"Bearer {hub.token}", "Bearer hf_stranger"):
            return self._error(401, "", "Invalid credentials in Authorization header")
        api, files = f"/api/models/{hub.repo}/", f"/{hub.repo}/resolve/"
        if path.startswith(api):
            what, _, rest = path.removeprefix(api).partition("/")
            return self._api(what, rest, parse_qs(url.query))
        if path.startswith(files):
            return self._resolve(*path.removeprefix(files).split("/", 1))
        if path == "/api/agent-harnesses":
            return self._json({})  # which programs the client names to the hub
        hub.refused.append(path)
        # The real one does not say to strangers whether there is a private repo.
        status = 404 if authorization else 401
        return self._error(status, "RepoNotFound", "Repository not found")

    def _api(self, what: str, rest: str, query: dict[str, list[str]]) -> None:
        hub = self.hub
        commit = self._commit(rest)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {rest}")
        if what == "revision":
            siblings = [{"rfilename": name} for name in hub.files]
            gated = "auto" if hub.gated else False
            return self._json(
                {"id": hub.repo, "modelId": hub.repo, "sha": commit, "private": False}
                | {"gated": gated, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
            )
        if what == "tree":
            assert query.get("recursive") == ["True"] or query.get("recursive") == ["true"], query
            folders = {str(p) for name in hub.files for p in Path(name).parents if str(p) != "."}
            entries = [
                {"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in folders
            ]
            return self._json(entries + [self._entry(name) for name in hub.files])
        self.hub.refused.append(self.path)
        return self._error(404, "", "Not Found")

    def _entry(self, name: str) -> dict[str, object]:
        content = self.hub.files[name]
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = hashlib.sha1(content).hexdigest()
        if len(content) >= LARGE:
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return entry

    def _resolve(self, revision: str, name: str) -> None:
        hub = self.hub
        commit = self._commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in hub.files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        if hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            status = 403 if self.headers.get("Authorization") else 401
            return self._error(status, "GatedRepo", f"Access to model {hub.repo} is restricted.")
        content = hub.files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if len(content) >= LARGE:
            headers["X-Linked-Size"] = str(len(content))
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            # To another host, as the real one: a token does not go along.
            place = hub.url.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{place}/storage/{name}"
            return self._send(302, b"", headers)
        return self._content(name, headers)

    def _content(self, name: str, headers: dict[str, str] | None = None) -> None:
        if self.command == "GET":
            self.hub.fetched.append(name)
        content = self.hub.files[name]
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            return self._send(206, part, {**(headers or {}), "Content-Range": place})
        return self._send(200, content, headers or {})

    def _commit(self, revision: str) -> str | None:
        commits = self.hub.commits
        return revision if revision in commits.values() else commits.get(revision)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        found = {"X-Error-Message": message, **(headers or {})}
        if code:
            found["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), found)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
