"""A stand-in for the hub: what `huggingface_hub` asks of it, over real sockets.

Repositories live in memory, a branch is a list of commits, and large files travel by LFS. Nothing
that is asked of it leaves this machine: the `hub` fixture refuses connections to any other.
"""

import hashlib
import json
import re
import socket
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_of_me"
OWNER = "me"
LARGE = ".safetensors"
KNOWN_LICENSES = ("apache-2.0", "mit", "other")


@dataclass(frozen=True)
class Blob:
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(f"blob {len(self.content)}\0".encode() + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit.oid == revision), None)

    def add(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        told = f"{branch} {message} {sum(map(len, self.branches.values()))}"
        commit = Commit(hashlib.sha1(told.encode()).hexdigest(), message, files)
        self.branches.setdefault(branch, []).append(commit)
        return commit


class Refused(Exception):
    """An answer of the hub that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes
    token: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Answer = tuple[int, Any, dict[str, str]]
"""Status, page (bytes, or what becomes JSON) and headers."""


def ok(page: Any) -> Answer:
    return 200, page, {}


class Hub:
    """Repositories, and what was asked of them."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.requests: list[Request] = []
        self.uploads: list[str] = []
        """SHA-256 of each large file that was sent."""
        self._acts: list[tuple[str, Callable[[], None]]] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()

    def create(self, name: str, files: dict[str, bytes] | None = None, private: bool = False):
        repository = self.repositories[name] = Repository(private)
        blobs = {path: Blob(content) for path, content in (files or {}).items()}
        repository.add("main", "initial commit", {".gitattributes": Blob(b"")} | blobs)
        return repository

    def before(self, pattern: str, act: Callable[[], None]) -> None:
        """Calls ``act`` before each request whose ``METHOD /path`` matches."""
        self._acts.append((pattern, act))

    def refuse(self, pattern: str, status: int, message: str = "", code: str = "") -> None:
        """Requests whose ``METHOD /path`` matches are answered so."""

        def act() -> None:
            raise Refused(status, message, code)

        self.before(pattern, act)

    def allow_all(self) -> None:
        self._acts.clear()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[name].find(revision)
        assert commit is not None
        found = {path: blob.content for path, blob in commit.files.items()}
        del found[".gitattributes"]
        return found

    def asked(self, pattern: str) -> list[Request]:
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]

    def answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            try:
                asked = f"{request.method} {request.path}"
                for pattern, act in self._acts:
                    if re.search(pattern, asked):
                        act()
                for pattern, function in ROUTES:
                    if found := re.fullmatch(pattern, asked):
                        return function(self, request, *map(unquote, found.groups()))
                raise Refused(404, f"no such page: {request.path}")
            except Refused as error:
                headers = {"X-Error-Message": error.message, "X-Error-Code": error.code}
                page = {"error": error.message}
                return error.status, page, {k: v for k, v in headers.items() if v}

    # ---- what is asked ----

    def _check_writer(self, request: Request, name: str) -> None:
        if request.token != TOKEN:
            raise Refused(401, "Invalid credentials in Authorization header")
        if name.split("/")[0] != OWNER:
            raise Refused(403, f"You don't have the rights to write to {name}")

    def _repository(self, request: Request, name: str) -> Repository:
        found = self.repositories.get(name)
        if found is None or (found.private and request.token != TOKEN):
            status = 404 if request.token == TOKEN else 401
            raise Refused(status, "Repository not found", "RepoNotFound")
        return found

    def _commit(self, request: Request, name: str, revision: str) -> Commit:
        found = self._repository(request, name).find(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def create_repository(self, request: Request) -> Answer:
        asked = request.json
        name = f"{asked['organization']}/{asked['name']}"
        self._check_writer(request, name)
        page = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return 409, {**page, "error": "You already created this model repo"}, {}
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        self.create(name, private=is_private)
        return ok(page)

    def create_branch(self, request: Request, name: str, branch: str) -> Answer:
        self._check_writer(request, name)
        repository = self._repository(request, name)
        if branch in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[branch] = [repository.branches["main"][-1]]
        return ok({})

    def check_card(self, request: Request) -> Answer:
        front = re.match(r"---\n(.*?)\n---\n", request.json["content"], re.DOTALL)
        data = yaml.safe_load(front[1]) if front else {}
        errors = []
        if data.get("license") not in (None, *KNOWN_LICENSES):
            errors.append({"message": f'"license" must be one of {", ".join(KNOWN_LICENSES)}'})
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
            errors.append({"message": '"base_model" must be a model id'})
        return 400 if errors else 200, {"errors": errors, "warnings": []}, {}

    def preupload(self, request: Request, name: str, revision: str) -> Answer:
        there = self._commit(request, name, revision).files
        told = []
        for file in request.json["files"]:
            path, is_large = file["path"], file["path"].endswith(LARGE)
            blob = there.get(path)
            oid = None if blob is None else (blob.sha256 if is_large else blob.git_oid)
            mode = "lfs" if is_large else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return ok({"files": told})

    def lfs_batch(self, request: Request, name: str) -> Answer:
        is_for_a_branch = "ref" in request.json  # who reads may send what a pull request needs
        self._check_writer(request, name if is_for_a_branch else OWNER)
        objects = []
        for asked in request.json["objects"]:
            stored = asked["oid"] in self.objects
            upload = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}", "header": {}}}
            verify = {"verify": {"href": f"{self.url}/lfs-verify"}}
            objects.append(asked if stored else {**asked, "actions": upload | verify})
        return ok({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> Answer:
        assert hashlib.sha256(request.body).hexdigest() == oid
        self.objects[oid] = request.body
        self.uploads.append(oid)
        return ok({})

    def lfs_verify(self, request: Request) -> Answer:
        asked = request.json
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(422, "the object did not arrive")
        return ok({})

    def commit(self, request: Request, name: str, revision: str) -> Answer:
        is_pull_request = request.query.get("create_pr") == ["1"]
        self._check_writer(request, OWNER if is_pull_request else name)
        before = self._commit(request, name, revision)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, before.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.objects[value["oid"]])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository = self.repositories[name]
        branch = f"refs/pr/{len(repository.branches)}" if is_pull_request else revision
        made = repository.add(branch, header["summary"], files)
        page = {"commitUrl": f"{self.url}/{name}/commit/{made.oid}", "commitOid": made.oid}
        number = branch.rpartition("/")[2]
        pull_request = f"{self.url}/{name}/discussions/{number}" if is_pull_request else None
        return ok({**page, "pullRequestUrl": pull_request})

    def info(self, request: Request, name: str, revision: str = "main") -> Answer:
        commit = self._commit(request, name, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        private = self.repositories[name].private
        return ok({"id": name, "sha": commit.oid, "private": private, "siblings": siblings})

    def tree(self, request: Request, name: str, revision: str) -> Answer:
        page = []
        for path, blob in self._commit(request, name, revision).files.items():
            size = len(blob.content)
            entry = {"type": "file", "path": path, "size": size, "oid": blob.git_oid}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": 134}
            page.append(entry)
        return ok(page)

    def resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        commit = self._commit(request, name, revision)
        if path not in commit.files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        blob = commit.files[path]
        etag = blob.sha256 if path.endswith(LARGE) else blob.git_oid
        return 200, blob.content, {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"'}


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"POST /api/repos/create", Hub.create_repository),
    (r"POST /api/validate-yaml", Hub.check_card),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Hub.preupload),
    (rf"POST /api/models/{NAME}/commit/(.+)", Hub.commit),
    (rf"POST /api/models/{NAME}/branch/(.+)", Hub.create_branch),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    (r"PUT /lfs/(\w+)", Hub.lfs_put),
    (r"POST /lfs-verify", Hub.lfs_verify),
    (rf"GET /api/models/{NAME}", Hub.info),
    (rf"GET /api/models/{NAME}/revision/(.+)", Hub.info),
    (rf"GET /api/models/{NAME}/tree/(.+)", Hub.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None: ...

        def _read(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def _answer(self) -> None:
            body, url = self._read(), urlsplit(self.path)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            query = parse_qs(url.query)
            status, page, headers = hub.answer(Request(self.command, url.path, query, body, token))
            content = page if isinstance(page, bytes) else json.dumps(page).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _answer

    return Handler


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """For a process of its own whose hub this is."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
    }


@contextmanager
def connected(hub: Hub, home: Path) -> Iterator[pytest.MonkeyPatch]:
    """This process takes ``hub`` for the hub, and reaches no other machine."""
    from huggingface_hub import constants, utils

    connect = socket.socket.connect

    def stay_here(self: socket.socket, address: Any) -> Any:
        assert address[0] in ("127.0.0.1", "localhost"), f"a test wanted to reach {address}"
        return connect(self, address)

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(hub, home).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(socket.socket, "connect", stay_here)
        utils.close_session()  # one that was made before has other proxies
        yield patch
    utils.close_session()
