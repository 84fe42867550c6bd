"""A stand-in for the Hugging Face Hub: as much of its HTTP protocol as pushing and loading take.

It keeps repositories in memory and is as strict as the Hub where a mistake of the client's would
go unnoticed otherwise: sizes and hashes of what is uploaded are compared, a commit may name only
large files that were uploaded, tokens have owners, and the header of a README must be YAML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENSES = ("mit", "apache-2.0", "cc-by-4.0", "other")
LARGE = (".safetensors", ".png")
"""What goes the way of large files (Git LFS)."""


@dataclass(frozen=True)
class Blob:
    """A file of a repository."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def git_hash(self) -> str:
        data = self.pointer if self.large else self.data
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_hash


@dataclass
class Repository:
    """Branches point to commits, commits hold files."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        told = json.dumps([len(self.commits), branch, message]).encode()
        oid = hashlib.sha1(told).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.commits[self.branches[branch]].items()}


class HubError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


class HubServer(ThreadingHTTPServer):
    """The Hub in a thread.

    Args:
        users: the names under which each token may write, by token.
    """

    daemon_threads = True

    def __init__(self, users: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failing: tuple[str, int] | None = None
        """Part of the path, and the status, of requests that are to fail."""
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def make(self, repo_id: str, private: bool = False, **files: bytes) -> Repository:
        """Put a repository there without going through the protocol."""
        repository = self.repositories[repo_id] = Repository(private)
        first = {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}
        first |= {name.replace("__", "."): Blob(data, False) for name, data in files.items()}
        repository.commit("main", first, "initial commit")
        return repository


@contextmanager
def running_hub(users: Mapping[str, tuple[str, ...]]) -> Iterator[HubServer]:
    """A Hub that listens while the block lasts."""
    server = HubServer(users)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self.rfile.read(length) if length else self._chunks()
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {unquote(parts.path)}")
            try:
                failing = self.server.failing
                if failing is not None and failing[0] in parts.path:
                    raise HubError(failing[1], "made to fail")
                self._route(parts.path)
            except HubError as error:
                headers = {"X-Error-Code": error.code} if error.code else {}
                headers["X-Error-Message"] = str(error)
                self._answer(error.status, error.body, headers)

    def _chunks(self) -> bytes:
        """A body sent in chunks, as clients send what they stream."""
        data = b""
        while "chunked" in self.headers.get("Transfer-Encoding", ""):
            size = int(self.rfile.readline(), 16)
            data += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return data

    def _route(self, path: str) -> None:
        routes = {
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": self._validate,
            r"GET /api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self._info,
            r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)": self._tree,
            r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)": self._branch,
            r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": self._preupload,
            r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": self._commit,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"PUT /lfs/([0-9a-f]{64})": self._put,
            r"POST /lfs/verify": self._verify,
            r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
            r"(?:GET|HEAD) /lfs/([0-9a-f]{64})": self._large,
        }
        for pattern, handle in routes.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return handle(*(each and unquote(each) for each in match.groups()))
        raise HubError(404, f"no such route: {self.command} {path}")

    def _create(self) -> None:
        wanted = self._json()
        owner = wanted.get("organization") or self._owners()[0]
        repo_id = f"{owner}/{wanted['name']}"
        if owner not in self._owners():
            raise HubError(403, f"You don't have the rights to create a model under {owner}")
        made = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repositories:
            raise HubError(409, "You already created this model repo", **made)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.make(repo_id, private)
        self._answer(200, made)

    def _validate(self) -> None:
        match = re.match(r"---\n(.*?\n)---\n", self._json()["content"], re.DOTALL)
        errors = []
        try:
            header = yaml.safe_load(match[1]) if match else {}
            if header.get("license", "mit") not in LICENSES:
                errors.append(f'"license" must be one of {list(LICENSES)}')
            errors += [
                f'"{key}" must be a list of text'
                for key in ("tags", "datasets", "base_model")
                if not all(isinstance(each, str) for each in header.get(key, []))
            ]
        except yaml.YAMLError as error:
            errors.append(str(error))
        told = {"errors": [{"message": each} for each in errors], "warnings": []}
        self._answer(400 if errors else 200, told)

    def _info(self, repo_id: str, revision: str | None) -> None:
        repository, oid, files = self._at(repo_id, revision or "main")
        self._answer(
            200,
            {
                "_id": "0" * 24,
                "id": repo_id,
                "modelId": repo_id,
                "sha": oid,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
            },
        )

    def _tree(self, repo_id: str, revision: str) -> None:
        _, _, files = self._at(repo_id, revision)
        if self.query.get("recursive", ["False"])[0].lower() not in ("true", "1"):
            raise HubError(400, "the stand-in lists whole trees alone")
        found = []
        for path, blob in files.items():
            entry: dict[str, Any] = {
                "type": "file", "path": path, "size": len(blob.data), "oid": blob.git_hash
            }  # fmt: skip
            if blob.large:
                entry["lfs"] = {
                    "oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)
                }  # fmt: skip
            found.append(entry)
        self._answer(200, found)

    def _branch(self, repo_id: str, branch: str) -> None:
        repository = self._writable(repo_id)
        if branch in repository.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.branches["main"]
        self._answer(200, {})

    def _preupload(self, repo_id: str, revision: str) -> None:
        self._writable(repo_id)
        _, _, files = self._at(repo_id, revision)
        modes = []
        for each in self._json()["files"]:
            path = each["path"]
            large = path.endswith(LARGE)
            mode: dict[str, Any] = {
                "path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False
            }  # fmt: skip
            if path in files:
                mode["oid"] = files[path].etag
            modes.append(mode)
        self._answer(200, {"files": modes})

    def _batch(self, repo_id: str) -> None:
        self._writable(repo_id)
        objects = []
        for each in self._json()["objects"]:
            entry: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.uploaded:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{each['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.url}/lfs/verify", "header": {}},
                }
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise HubError(400, "the hash differs")
        self.server.uploaded[oid] = self.content
        self._answer(200, {})

    def _verify(self) -> None:
        wanted = self._json()
        if len(self.server.uploaded.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(422, "the size differs")
        self._answer(200, {})

    def _commit(self, repo_id: str, revision: str) -> None:
        repository = self._writable(repo_id)
        _, _, before = self._at(repo_id, revision)
        if revision not in repository.branches:
            raise HubError(400, f"{revision} is no branch")
        files, message = dict(before), ""
        for line in self.content.decode().splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.uploaded:
                    raise HubError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.server.uploaded[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"what is {key}?")
        oid = repository.commit(revision, files, message)
        url = f"{self.server.url}/{repo_id}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        _, oid, files = self._at(repo_id, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"'}
        if blob.large:
            headers |= {
                "X-Linked-ETag": f'"{blob.sha256}"',
                "X-Linked-Size": str(len(blob.data)),
                # Another host, as on the Hub: the client reads this answer before it goes there.
                "Location": f"http://localhost:{self.server.server_port}/lfs/{blob.sha256}",
            }
            self._answer(302, b"", headers)
        else:
            self._answer(200, blob.data, headers)

    def _large(self, oid: str) -> None:
        self._answer(200, self.server.uploaded[oid], {"ETag": f'"{oid}"'})

    def _owners(self) -> tuple[str, ...]:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or token not in self.server.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.server.users[token]

    def _at(self, repo_id: str, revision: str) -> tuple[Repository, str, dict[str, Blob]]:
        repository = self.server.repositories.get(repo_id)
        known = self.headers.get("Authorization", "").partition(" ")[2]
        readers = self.server.users.get(known, ())
        if repository is None or (repository.private and repo_id.split("/")[0] not in readers):
            raise HubError(404 if known else 401, "Repository not found", "RepoNotFound")
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, oid, repository.commits[oid]

    def _writable(self, repo_id: str) -> Repository:
        owners = self._owners()
        repository, _, _ = self._at(repo_id, "main")
        if repo_id.split("/")[0] not in owners:
            raise HubError(403, "Forbidden: pass `create_pr=1` to open a pull request instead")
        return repository

    def _json(self) -> Any:
        return json.loads(self.content)

    def _answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
