"""A small model Hub on the loopback interface: what the unmodified `huggingface_hub` client needs, over real HTTP.

Repositories with a history of commits, branches, tags and private ones; tokens; regular and LFS uploads; downloads with
the headers that the client's cache relies on (an LFS file by a redirect, as the real one does); the check of a model
card's metadata. Xet, the Hub's newer storage, is not offered: the client asks no server whether there is one, so set
`HF_HUB_DISABLE_XET=1` in its environment.

    with running_hub({"token-of-user": "user"}) as hub:
        run_with({"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "token-of-user", "HF_HUB_DISABLE_XET": "1"})
        hub.repositories["user/name"].read("README.md")
"""

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
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
REPO_ID = r"(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


class HubError(Exception):
    """An answer other than success, with the code by which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


@dataclass
class Answer:
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Answer:
        return cls(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """The id that git gives the file: of its content, or of the pointer that stands for it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        stored = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0%s" % (len(stored), stored)).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def described(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: Commit | None
    title: str
    files: dict[str, File]

    @classmethod
    def on(cls, parent: Commit | None, title: str, files: dict[str, File]) -> Commit:
        content = [
            parent.oid if parent else "",
            title,
            *(f"{path} {file.etag}" for path, file in sorted(files.items())),
        ]
        return cls(hashlib.sha1("\n".join(content).encode()).hexdigest(), parent, title, files)

    def history(self) -> list[Commit]:
        return [self, *(self.parent.history() if self.parent else [])]


class Repository:
    """A repository's commits, and the branches and tags that name some of them."""

    def __init__(self, is_private: bool) -> None:
        self.is_private = is_private
        first = Commit.on(None, "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self.branches = {"main": first}
        self.tags: dict[str, Commit] = {}

    def commit_of(self, revision: str = "main") -> Commit:
        named = {**self.tags, **self.branches}
        if revision in named:
            return named[revision]
        for commit in [commit for head in named.values() for commit in head.history()]:
            if len(revision) >= 7 and commit.oid.startswith(revision):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.file(path, revision).content

    def file(self, path: str, revision: str) -> File:
        commit = self.commit_of(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.oid)
        return commit.files[path]

    def add_commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        self.branches[branch] = Commit.on(self.branches[branch], title, files)
        return self.branches[branch]


@dataclass
class Request:
    """A request, and the names that its route found in its path."""

    method: str
    path: str
    headers: Any
    body: bytes
    names: dict[str, str] = field(default_factory=dict)

    @property
    def route(self) -> str:
        return urlsplit(self.path).path

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)


class HubServer(ThreadingHTTPServer):
    """
    The Hub, on a free port.

    Args:
        tokens (`dict[str, str]`): The user of every token.
    """

    daemon_threads = True

    def __init__(self, tokens: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """The variables for a process that uses this Hub, with its cache in a folder of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    # ------------------------------------------------------------------------------------------------ who may what

    def user(self, request: Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def writer(self, request: Request, namespace: str) -> str:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != namespace:
            raise HubError(403, f"Forbidden: you have no rights in the namespace {namespace}")
        return user

    def repository(self, request: Request, to_write: bool = False) -> Repository:
        repo_id = request.names["repo_id"]
        owner = repo_id.split("/")[0]
        repository = self.repositories.get(repo_id)
        user = self.user(request)
        if repository is None or (repository.is_private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if to_write:
            self.writer(request, owner)
        return repository

    # ------------------------------------------------------------------------------------------------ repositories

    def whoami(self, request: Request) -> Answer:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return Answer.json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self, request: Request) -> Answer:
        namespace = request.json.get("organization") or self.user(request) or ""
        self.writer(request, namespace)
        repo_id = f"{namespace}/{request.json['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            return Answer.json({**answer, "error": "You already created this model repo"}, status=409)
        self.repositories[repo_id] = Repository(request.json.get("visibility") == "private")
        return Answer.json(answer)

    def describe(self, request: Request) -> Answer:
        repository = self.repository(request)
        commit = repository.commit_of(request.names.get("revision") or "main")
        names = {"id": request.names["repo_id"], "sha": commit.oid, "private": repository.is_private}
        return Answer.json({**names, "siblings": [{"rfilename": path} for path in commit.files], "tags": []})

    def list_files(self, request: Request) -> Answer:
        commit = self.repository(request).commit_of(request.names["revision"])
        folder = f"{request.names['path']}/" if request.names.get("path") else ""
        entries: dict[str, Any] = {}
        for path, file in commit.files.items():
            if not path.startswith(folder):
                continue
            inside, *deeper = path.removeprefix(folder).split("/")
            if deeper and request.query.get("recursive", ["false"])[0].lower() not in ("1", "true"):
                entries[folder + inside] = {"type": "directory", "path": folder + inside, "oid": "0" * 40, "size": 0}
            else:
                entries[path] = file.described(path)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", commit.oid)
        return Answer.json(list(entries.values()))

    def describe_paths(self, request: Request) -> Answer:
        files = self.repository(request).commit_of(request.names["revision"]).files
        paths = parse_qs(request.body.decode()).get("paths", [])
        return Answer.json([files[path].described(path) for path in paths if path in files])

    def list_references(self, request: Request) -> Answer:
        repository = self.repository(request)

        def listed(kind: str, named: dict[str, Commit]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c.oid} for n, c in named.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        return Answer.json({"branches": branches, "tags": tags, "converts": []})

    def list_commits(self, request: Request) -> Answer:
        history = self.repository(request).commit_of(request.names["revision"]).history()
        return Answer.json(
            [{"id": c.oid, "title": c.title, "message": "", "authors": [], "date": DATE} for c in history]
        )

    def create_branch(self, request: Request) -> Answer:
        repository = self.repository(request, to_write=True)
        if request.names["revision"] in repository.branches:
            raise HubError(409, "Reference already exists")
        start = repository.commit_of(request.json.get("startingPoint", "main"))
        repository.branches[request.names["revision"]] = start
        return Answer.json({})

    def create_tag(self, request: Request) -> Answer:
        repository = self.repository(request, to_write=True)
        if request.json["tag"] in repository.tags:
            raise HubError(409, "Tag reference exists already")
        repository.tags[request.json["tag"]] = repository.commit_of(request.names["revision"])
        return Answer.json({})

    # ------------------------------------------------------------------------------------------------ uploads

    def validate_card(self, request: Request) -> Answer:
        found = re.match(r"\s*---\r?\n(.*?)\r?\n---", request.json["content"], re.DOTALL)
        if found is None:
            return Answer.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        errors = card_errors(found[1])
        return Answer.json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def choose_upload_modes(self, request: Request) -> Answer:
        files = self.repository(request, to_write=True).commit_of(request.names["revision"]).files
        modes = []
        for path in [entry["path"] for entry in request.json["files"]]:
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = files[path].etag if path in files else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.json({"files": modes})

    def plan_lfs_uploads(self, request: Request) -> Answer:
        self.repository(request, to_write=True)
        objects = []
        for entry in request.json["objects"]:
            upload = {"href": f"{self.endpoint}/lfs/{entry['oid']}?signature={self.signature(entry['oid'])}"}
            verify = {"href": f"{self.endpoint}/{request.names['repo_id']}.git/info/lfs/verify"}
            actions = {} if entry["oid"] in self.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": entry["oid"], "size": entry["size"], **actions})
        return Answer.json({"transfer": "basic", "objects": objects})

    def signature(self, oid: str) -> str:
        """What makes a URL for one object work without a token."""
        return hashlib.sha256(f"{id(self)} {oid}".encode()).hexdigest()

    def _check_signature(self, request: Request) -> str:
        oid = request.names["oid"]
        if request.query.get("signature") != [self.signature(oid)]:
            raise HubError(403, "Signature does not match")
        return oid

    def store_object(self, request: Request) -> Answer:
        oid = self._check_signature(request)
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(422, "The content does not have this hash")
        self.objects[oid] = request.body
        return Answer()

    def verify_object(self, request: Request) -> Answer:
        self.repository(request, to_write=True)
        if len(self.objects.get(request.json["oid"], b"")) != request.json["size"]:
            raise HubError(422, "The object was not uploaded")
        return Answer.json({})

    def commit(self, request: Request) -> Answer:
        repository = self.repository(request, to_write=True)
        branch = request.names["revision"]
        files, title = dict(repository.commit_of(branch).files), ""
        for line in request.body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubError(400, f"The LFS object of {value['path']} was not uploaded")
                files[value["path"]] = File(self.objects[value["oid"]], is_lfs=True)
            elif kind == "deletedFile":
                files.pop(value["path"])
        commit = repository.add_commit(branch, title, files)
        url = f"{self.endpoint}/{request.names['repo_id']}/commit/{commit.oid}"
        return Answer.json({"success": True, "commitUrl": url, "commitOid": commit.oid, "hookOutput": ""})

    # ------------------------------------------------------------------------------------------------ downloads

    def resolve(self, request: Request) -> Answer:
        repository, revision = self.repository(request), request.names["revision"]
        file = repository.file(request.names["path"], revision)
        headers = {"X-Repo-Commit": repository.commit_of(revision).oid, "Accept-Ranges": "bytes"}
        if not file.is_lfs:
            return ranged(request, file.content, {**headers, "ETag": f'"{file.etag}"'})
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        # under another host name, as a content delivery network has: the client must go there without the token
        storage = f"http://localhost:{self.server_port}/lfs/{file.sha256}"
        headers["Location"] = f"{storage}?signature={self.signature(file.sha256)}"
        return Answer(b"", headers, status=302)

    def load_object(self, request: Request) -> Answer:
        oid = self._check_signature(request)
        return ranged(request, self.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


@contextmanager
def running_hub(tokens: dict[str, str]) -> Iterator[HubServer]:
    """Run a Hub with these tokens' users in the background."""
    hub = HubServer(tokens)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """Return a file, or the part of it that a `Range: bytes=first-last` asks for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Answer(content, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
    if first >= len(content):
        raise HubError(416, "Requested range not satisfiable")
    part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return Answer(content[first : last + 1], {**headers, **part}, status=206)


def card_errors(metadata: str) -> list[dict[str, str]]:
    """Return what the real Hub would refuse in a model card's metadata, of what an adapter's card may have."""
    try:
        data = yaml.safe_load(metadata)
    except yaml.YAMLError as error:
        return [{"message": str(error)}]
    if not isinstance(data, dict):
        return [{"message": "the metadata must be a mapping"}]
    base_models = data.get("base_model", [])
    errors = [
        {"message": f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'}
        for name in (base_models if isinstance(base_models, list) else [base_models])
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))
    ]
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append({"message": '"tags" must be an array of strings'})
    return errors


ROUTES = [
    (method, re.compile(pattern), action)
    for method, pattern, action in (
        ("GET", "/api/whoami-v2", HubServer.whoami),
        ("POST", "/api/validate-yaml", HubServer.validate_card),
        ("POST", "/api/repos/create", HubServer.create_repository),
        ("GET", f"/api/models/{REPO_ID}", HubServer.describe),
        ("GET", f"/api/models/{REPO_ID}/revision/{REVISION}", HubServer.describe),
        ("GET", f"/api/models/{REPO_ID}/tree/{REVISION}(/(?P<path>.+))?", HubServer.list_files),
        ("POST", f"/api/models/{REPO_ID}/paths-info/{REVISION}", HubServer.describe_paths),
        ("GET", f"/api/models/{REPO_ID}/refs", HubServer.list_references),
        ("GET", f"/api/models/{REPO_ID}/commits/{REVISION}", HubServer.list_commits),
        ("POST", f"/api/models/{REPO_ID}/branch/{REVISION}", HubServer.create_branch),
        ("POST", f"/api/models/{REPO_ID}/tag/{REVISION}", HubServer.create_tag),
        ("POST", f"/api/models/{REPO_ID}/preupload/{REVISION}", HubServer.choose_upload_modes),
        ("POST", f"/api/models/{REPO_ID}/commit/{REVISION}", HubServer.commit),
        ("POST", rf"/{REPO_ID}\.git/info/lfs/objects/batch", HubServer.plan_lfs_uploads),
        ("POST", rf"/{REPO_ID}\.git/info/lfs/verify", HubServer.verify_object),
        ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.store_object),
        ("GET", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.load_object),
        ("GET", f"/{REPO_ID}/resolve/{REVISION}/(?P<path>.+)", HubServer.resolve),
    )
]


class Handler(BaseHTTPRequestHandler):
    """Reads a request, hands it to the route that fits, and writes the answer."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    server: HubServer

    def do_GET(self) -> None:
        request = Request(self.command, self.path, self.headers, self._body())
        try:
            with self.server.lock:
                self.server.requests.append(request)
                answer = self._answer(request)
        except HubError as error:
            headers = {"X-Error-Message": str(error)}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Repo-Commit": error.commit} if error.commit else {}
            answer = Answer.json({"error": str(error)}, error.status)
            answer.headers |= headers
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        for of_method, pattern, action in ROUTES:
            found = pattern.fullmatch(request.route)
            if found and of_method == method:
                request.names = {name: unquote(value) for name, value in found.groupdict().items() if value}
                return action(self.server, request)
        raise HubError(404, "Not found")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing: the server's `requests` hold what came."""
