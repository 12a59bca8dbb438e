"""A small local Hugging Face Hub: as much of its HTTP interface as huggingface_hub needs to push and load a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_thisTokenMustNotAppearAnywhere"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by name of each commit, oldest first."""

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = files
        return digest

    @property
    def head(self) -> str:
        return next(reversed(self.commits))


class Hub(ThreadingHTTPServer):
    """The server: repositories by name, objects of git-lfs, and what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.status = 0  # answered to every request if not 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def use(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub use this server, a cache of its own, and a token that may write."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        server.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has git-lfs only
    monkeypatch.setenv("HF_TOKEN", TOKEN)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.server.requests.append(f"{self.command} {path}")
        if self.server.status:
            return self._answer(self.server.status, b"")
        if self.command == "POST" and not self._may_write:  # as on the Hub, objects are put to signed addresses
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/objects/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.server.objects[found[1]] = body
            return self._answer(200)
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [{**each, "actions": {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}}}
                       for each in json.loads(body)["objects"]]  # fmt: skip
            return self._answer(200, {"transfer": "basic", "objects": objects})
        api = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/(.+?))?(?:/)?", path)
        file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        name = api[1] if api else file[1] if file else ""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._may_write):
            return self._answer(401 if not self._may_write else 404, X_Error_Code="RepoNotFound")
        if api:
            return self._api(repository, name, api[2] or "revision", api[3] or "main", body)
        assert file is not None
        return self._file(repository, file[2], file[3])

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization')}/{wanted['name']}"
        exists = name in self.server.repositories
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repositories.setdefault(name, Repository(private))
        if not exists:
            self.server.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs"})
        self._answer(409 if exists else 200, {"url": f"{self.server.url}/{name}"})

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        return repository.head if revision == "main" else revision if revision in repository.commits else None

    def _api(self, repository: Repository, name: str, what: str, revision: str, body: bytes) -> None:
        digest = self._commit_of(repository, revision.partition("/")[0])
        if digest is None:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        files = repository.commits[digest]
        if what == "revision":
            siblings = [{"rfilename": each, "size": len(data)} for each, data in files.items()]
            return self._answer(200, {"id": name, "sha": digest, "siblings": siblings, "private": repository.private})
        if what == "preupload":
            modes = [{"path": each["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                     for each in json.loads(body)["files"]]  # fmt: skip
            return self._answer(200, {"files": modes})
        if what != "commit":
            return self._answer(404)
        new = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        digest = repository.commit(new)
        url = f"{self.server.url}/{name}/commit/{digest}"
        return self._answer(200, {"commitUrl": url, "commitOid": digest, "success": True})

    def _file(self, repository: Repository, revision: str, name: str) -> None:
        digest = self._commit_of(repository, revision)
        if repository.gated:
            return self._answer(403, X_Error_Code="GatedRepo")
        if digest is None or name not in repository.commits[digest]:
            return self._answer(404, X_Error_Code="RevisionNotFound" if digest is None else "EntryNotFound")
        data = repository.commits[digest][name]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self._answer(200, data, X_Repo_Commit=digest, ETag=etag)


for method in ("GET", "HEAD", "POST", "PUT"):
    setattr(_Handler, f"do_{method}", _Handler._serve)
