"""A small Hugging Face Hub on this machine, for tests that have no network.

`HubServer` speaks the part of the Hub's HTTP protocol that `huggingface_hub`, `transformers` and `datasets` use to
read and to publish models and datasets. The unmodified clients work with it once HF_ENDPOINT names its address.

    with HubServer(folder, tokens={"hf_alice": ("alice", "write")}) as hub:
        hub.add_dataset("alice/letters", {"train.jsonl": b'{"text": "a"}'})
        subprocess.run(command, env=os.environ | hub.environment(hf_home, token="hf_alice"))

Repositories are plain folders, `ROOT/models/OWNER/NAME` and `ROOT/datasets/OWNER/NAME`: what lies there is served and
what a client uploads appears there. From a shell: `python tests/hub_server.py --root FOLDER` prints the address.

Left out on purpose: branches, tags, pull requests and old revisions (only `main` and its present commit exist), ids
without an owner, Spaces, `.gitignore` rules, card metadata in the repository info, and Xet storage.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

# The Hub keeps files with these endings, and files from this size on, in large-file storage (LFS).
LFS_ENDINGS = (".arrow", ".bin", ".gz", ".model", ".npy", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
LFS_BYTES = 10 * 1024 * 1024

REPO = r"(?P<kind>models|datasets)/(?P<repo_id>[\w.-]+(?:/[\w.-]+)??)"  # the API's form
SITE = r"(?:(?P<kind>datasets)/)?(?P<repo_id>[\w.-]+(?:/[\w.-]+)??)"  # the web pages' form: models have no prefix
REVISION = r"(?P<revision>[^/]+)"
PATH = r"(?P<path>.+)"
OID = r"(?P<oid>[0-9a-f]{64})"


class HubError(Exception):
    """An answer that refuses the request. The client picks its exception class by `code` (the X-Error-Code header)."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message} | extra, status, headers)


class User(NamedTuple):
    """Whom a token belongs to, and what it allows: "read" or "write"."""

    name: str
    role: str


class Blob(NamedTuple):
    """What the Hub reports about the content of one file."""

    size: int
    git_oid: str
    sha256: str
    is_lfs: bool

    @property
    def pointer(self) -> bytes:
        """The text that git stores instead of a file in large-file storage."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Request:
    """One request as the endpoints see it."""

    user: User | None
    query: dict[str, list[str]]
    body: bytes

    def json(self):
        return json.loads(self.body)


@dataclass
class Answer:
    """What an endpoint returns: the bytes of a file, or something to send as JSON."""

    content: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """A planned failure, used up by the first `times` requests that match.

    `kind` is a status to answer (429, 500, 502, 503, 504, …), "drop" (close the connection without an answer), "cut"
    (close it after `after` bytes of the body, by default half of them) or "delay" (answer `seconds` late).
    """

    kind: int | str
    path_contains: str = ""
    method: str | None = None
    times: int = 1
    after: int | None = None
    seconds: float = 0.0
    retry_after: int | None = None

    def __post_init__(self):
        if not isinstance(self.kind, int) and self.kind not in ("drop", "cut", "delay"):
            raise ValueError(f"unknown kind of fault: {self.kind!r}")

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in (None, method) and self.path_contains in path


class LoggedRequest(NamedTuple):
    """One line of the request log; the status is 0 when the connection was dropped before an answer."""

    method: str
    path: str
    status: int


@dataclass(frozen=True)
class Repo:
    """One repository: `kind` is "models" or "datasets"."""

    kind: str
    repo_id: str
    folder: Path

    @property
    def owner(self) -> str:
        return self.repo_id.partition("/")[0]

    @property
    def page(self) -> str:
        """The path of the repository's page on the site."""
        return self.repo_id if self.kind == "models" else f"{self.kind}/{self.repo_id}"

    def file(self, path: str) -> Path:
        """The place of a file or folder in the repository; a path that leads out of it is refused."""
        target = Path(os.path.normpath(self.folder / path))
        if not target.is_relative_to(self.folder):
            raise HubError(400, f"Invalid path: {path}")
        return target

    def files(self) -> list[str]:
        return sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())


ROUTES = []


def route(methods: str, pattern: str, access: str | None = None):
    """Register an endpoint. `access` is what it does with a repository: "look", "read" its files, or "write"."""

    def register(endpoint):
        ROUTES.append((methods.split(), re.compile(pattern), access, endpoint))
        return endpoint

    return register


class HubServer:
    """The server, which runs in threads of this process between `with HubServer(...) as hub:` and the block's end.

    Args:
        root: the folder that holds the repositories.
        tokens: token → (user name, "read" or "write"). Everybody may read public repositories without a token.
        gated: id of a gated repository → names of the users who were granted access (its owner always has it).
        port: the port to listen on; 0 takes a free one.
        lfs: whether large and binary files are uploaded by the LFS protocol, as to the real Hub. huggingface_hub 1.0
            and later uploads such files through Xet storage, which this server does not have, wherever hf_xet is
            installed and HF_HUB_DISABLE_XET=1 is not set. `lfs=False` has files of any kind sent inside the commit.
        multipart_bytes: LFS files larger than this are uploaded in several parts of this size.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        tokens: Mapping[str, tuple[str, str]] | None = None,
        gated: Mapping[str, Collection[str]] | None = None,
        port: int = 0,
        lfs: bool = True,
        multipart_bytes: int = 64 * 1024 * 1024,
    ):
        self.root = Path(root).absolute()
        self.requests: list[LoggedRequest] = []
        self.faults: list[Fault] = []
        self._users = {token: User(*user) for token, user in (tokens or {}).items()}
        self._gated = gated or {}
        self._lfs = lfs
        self._multipart_bytes = multipart_bytes
        self._private: set[Path] = set()
        self._commits: dict[Path, list[dict]] = {}
        self._blobs: dict[tuple, Blob] = {}
        self._lock = threading.Lock()
        self._objects = self.root / ".lfs"
        self._objects.mkdir(parents=True, exist_ok=True)
        self._http = _HTTPServer(("127.0.0.1", port), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._http.shutdown()
        self._http.server_close()

    # ---- what tests and fixtures call

    def environment(self, hf_home: str | Path, token: str | None = None) -> dict[str, str]:
        """The environment variables that make a client process use this server and nothing else."""
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(hf_home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        settings |= {"HF_HUB_DISABLE_XET": "1"} if self._lfs else {}
        return settings | ({"HF_TOKEN": token} if token else {})

    def add_model(self, repo_id: str, folder: str | Path, *, private: bool = False) -> None:
        """Serve a copy of a model's folder."""
        repo = self._create("models", repo_id, private)
        shutil.copytree(folder, repo.folder, dirs_exist_ok=True)

    def add_dataset(self, repo_id: str, files: Mapping[str, bytes | str | Path], *, private: bool = False) -> None:
        """Serve a dataset of these files: name in the repository → content, or path of the file to copy."""
        repo = self._create("datasets", repo_id, private)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else Path(content).read_bytes()
            _write(repo.file(name), data)

    def fault(self, kind: int | str, **options) -> None:
        """Plan a failure; the options are the fields of `Fault`."""
        self.faults.append(Fault(kind, **options))

    # ---- used by the HTTP side

    def answer(self, method: str, target: str, authorization: str | None, body: bytes) -> Answer:
        """Find the endpoint for a request, check that the user may call it, and call it."""
        url = urlsplit(target)
        try:
            user = self._user(authorization)
            for methods, pattern, access, endpoint in ROUTES:
                if method in methods and (match := pattern.fullmatch(url.path)):
                    values = {name: value and unquote(value) for name, value in match.groupdict().items()}
                    with self._lock:  # one request at a time sees and changes the folders
                        if access:
                            kind = values.pop("kind") or "models"
                            values["repo"] = self._open(kind, values.pop("repo_id"), user, access)
                            self._check_revision(values["repo"], values.pop("revision", None))
                        return endpoint(self, Request(user, parse_qs(url.query), body), **values)
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            return error.answer

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            fault = next((fault for fault in self.faults if fault.matches(method, path)), None)
            if fault:
                fault.times -= 1
            return fault

    # ---- users and rights

    def _user(self, authorization: str | None) -> User | None:
        if not authorization:
            return None
        user = self._users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _open(self, kind: str, repo_id: str, user: User | None, access: str) -> Repo:
        """The repository, if this user may do that with it."""
        repo = Repo(kind, repo_id, self.root / kind / repo_id)
        is_owner = user is not None and user.name == repo.owner
        hidden = repo.folder in self._private and not is_owner
        if "/" not in repo_id or ".." in repo_id or not repo.folder.is_dir() or hidden:
            # Nobody learns whether a private repository exists. The Hub gives no code with its 401, but the client
            # understands that answer by its address, and only by one that starts with https.
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if access == "write":
            self._check_write(user, repo.owner, f"upload to the {kind[:-1]} {repo_id}")
        if access == "read" and repo_id in self._gated and not is_owner:
            start = f"Access to {kind[:-1]} {repo_id} is restricted"
            if user is None:
                raise HubError(
                    401, f"{start}. You must have access to it and be authenticated to access it.", "GatedRepo"
                )
            if user.name not in self._gated[repo_id]:
                ask = f"Visit {self.url}/{repo.page} to ask for access."
                raise HubError(403, f"{start} and you are not in the authorized list. {ask}", "GatedRepo")
        return repo

    @staticmethod
    def _check_write(user: User | None, namespace: str, action: str) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user.role != "write":
            raise HubError(403, f"Forbidden: you must use a write token to {action}.")
        if user.name != namespace:
            raise HubError(403, f'You don\'t have the rights to {action} under the namespace "{namespace}"')

    # ---- repositories

    def _create(self, kind: str, repo_id: str, private: bool) -> Repo:
        repo = Repo(kind, repo_id, self.root / kind / repo_id)
        repo.folder.mkdir(parents=True, exist_ok=True)
        (self._private.add if private else self._private.discard)(repo.folder)
        return repo

    def _check_revision(self, repo: Repo, revision: str | None) -> None:
        if revision not in (None, "main") and revision != self._head(repo)["id"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _blob(self, file: Path) -> Blob:
        """What the file holds now; kept until the file changes, because hashing a large file takes long."""
        status = file.stat()
        key = (file, status.st_ino, status.st_mtime_ns, status.st_size)
        if key not in self._blobs:
            data = file.read_bytes()
            git_oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._blobs[key] = Blob(len(data), git_oid, hashlib.sha256(data).hexdigest(), _is_lfs(file.name, len(data)))
        return self._blobs[key]

    def _tree(self, repo: Repo) -> str:
        """An id of everything the repository holds now."""
        listing = "\n".join(f"{path} {self._blob(repo.file(path)).git_oid}" for path in repo.files())
        return hashlib.sha1(listing.encode()).hexdigest()

    def _head(self, repo: Repo) -> dict:
        """The present commit. Files that a test put into the folder count as a commit, too."""
        commits = self._commits.get(repo.folder)
        if not commits or commits[-1]["tree"] != self._tree(repo):
            return self._record(repo, repo.owner, "Files placed in the folder")
        return commits[-1]

    def _record(self, repo: Repo, author: str, title: str, message: str = "") -> dict:
        """Add a commit of the present content. Its id depends on those before it, so it is never an old one again."""
        commits = self._commits.setdefault(repo.folder, [])
        tree, date = self._tree(repo), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        oid = hashlib.sha1(f"{repo.page} {len(commits)} {tree}".encode()).hexdigest()
        about = {"title": title, "message": message, "authors": [{"user": author}], "date": date}
        commits.append({"id": oid, "tree": tree} | about)
        return commits[-1]

    def _entry(self, repo: Repo, path: str) -> dict:
        """A file or folder as the listings describe it."""
        if repo.file(path).is_dir():
            return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
        blob = self._blob(repo.file(path))
        entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_oid}
        if blob.is_lfs:
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(blob.pointer) + blob.pointer).hexdigest()
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        return entry

    # ---- endpoints: account and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        access_token = {"displayName": "test token", "role": request.user.role}
        auth = {"type": "access_token", "accessToken": access_token}
        return Answer({"type": "user", "name": request.user.name, "orgs": [], "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Answer:
        return Answer({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        wanted = request.json()
        kind = wanted.get("type") or "model"
        namespace = wanted.get("organization") or (request.user and request.user.name)
        self._check_write(request.user, namespace, f"create a {kind}")
        if kind not in ("model", "dataset"):
            raise HubError(400, f"This test server has no repositories of type {kind}")
        repo_id = f"{namespace}/{wanted['name']}"
        repo = Repo(f"{kind}s", repo_id, self.root / f"{kind}s" / repo_id)
        names = {"url": f"{self.url}/{repo.page}", "name": repo_id, "id": repo_id}
        if repo.folder.is_dir():
            raise HubError(409, f"You already created this {kind} repo: {repo_id}", **names)
        # huggingface_hub before 1.0 sends "private", later ones send "visibility".
        self._create(repo.kind, repo_id, bool(wanted.get("private")) or wanted.get("visibility") == "private")
        return Answer(names)

    @route("GET HEAD", f"/api/{REPO}(?:/revision/{REVISION})?", "look")
    def info(self, request: Request, repo: Repo) -> Answer:
        siblings = []
        for path in repo.files():
            siblings.append({"rfilename": path})
            if "blobs" in request.query:
                entry = self._entry(repo, path)
                siblings[-1] |= {"size": entry["size"], "blobId": entry["oid"]}
                if lfs := entry.get("lfs"):
                    siblings[-1]["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        head = self._head(repo)
        about = {"_id": hashlib.sha1(repo.page.encode()).hexdigest()[:24], "id": repo.repo_id, "author": repo.owner}
        about |= {"sha": head["id"], "lastModified": head["date"], "createdAt": self._commits[repo.folder][0]["date"]}
        about |= {"private": repo.folder in self._private, "gated": "manual" if repo.repo_id in self._gated else False}
        return Answer(about | {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    @route("GET", f"/api/{REPO}/tree/{REVISION}(?:/{PATH})?", "look")
    def tree(self, request: Request, repo: Repo, path: str | None) -> Answer:
        top = repo.file(path or "")
        if not top.is_dir():
            raise HubError(404, f"{path} does not exist on main", "EntryNotFound")
        recursive = request.query.get("recursive", [""])[0].lower() in ("1", "true")
        found = top.rglob("*") if recursive else top.iterdir()
        return self._describe(repo, sorted(file.relative_to(repo.folder).as_posix() for file in found), request.query)

    @route("POST", f"/api/{REPO}/paths-info/{REVISION}", "look")
    def paths_info(self, request: Request, repo: Repo) -> Answer:
        form = parse_qs(request.body.decode())
        paths = [path.strip("/") for path in form.get("paths", [])]
        return self._describe(repo, [path for path in paths if repo.file(path).exists()], form)

    def _describe(self, repo: Repo, paths: list[str], options: dict[str, list[str]]) -> Answer:
        entries = [self._entry(repo, path) for path in paths]
        if options.get("expand", [""])[0].lower() in ("1", "true"):
            # The server keeps no history of single files: each of them counts as changed by the last commit.
            last_commit = self._head(repo)
            entries = [entry | {"lastCommit": last_commit} for entry in entries]
        return Answer(entries)

    @route("GET", f"/api/{REPO}/refs", "look")
    def refs(self, request: Request, repo: Repo) -> Answer:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self._head(repo)["id"]}
        return Answer({"branches": [main], "converts": [], "tags": [], "pullRequests": []})

    @route("GET", f"/api/{REPO}/commits/{REVISION}", "look")
    def commits(self, request: Request, repo: Repo) -> Answer:
        self._head(repo)
        return Answer(self._commits[repo.folder][::-1])

    @route("GET", f"/api/{REPO}/auth-check", "read")
    def auth_check(self, request: Request, repo: Repo) -> Answer:
        return Answer({})

    @route("GET", f"/api/{REPO}/xet-(?:read|write)-token/.*", "look")
    def xet_token(self, request: Request, repo: Repo) -> Answer:
        # A refusal that clients do not retry: an unanswered or failing address would be asked for minutes.
        raise HubError(400, "This test server has no Xet storage: set HF_HUB_DISABLE_XET=1, or start it with lfs=False")

    # ---- endpoints: files

    @route("GET HEAD", f"/{SITE}/resolve/{REVISION}/{PATH}", "read")
    def resolve(self, request: Request, repo: Repo, path: str) -> Answer:
        file = repo.file(path)
        headers = {"X-Repo-Commit": self._head(repo)["id"], "Accept-Ranges": "bytes"}
        if not file.is_file():
            missing = HubError(404, "Entry not found", "EntryNotFound")
            missing.answer.headers |= headers  # with the commit's id, clients remember that the file is missing
            raise missing
        blob = self._blob(file)
        return Answer(
            file.read_bytes(), headers=headers | {"ETag": f'"{blob.sha256 if blob.is_lfs else blob.git_oid}"'}
        )

    @route("POST", f"/api/{REPO}/preupload/{REVISION}", "write")
    def preupload(self, request: Request, repo: Repo) -> Answer:
        """Answer how each file is to be uploaded, and what is there now, so that unchanged files can be left out."""
        answers = []
        for wanted in request.json()["files"]:
            lfs = self._lfs and _is_lfs(wanted["path"], wanted["size"])
            file = repo.file(wanted["path"])
            blob = self._blob(file) if file.is_file() else None
            answer = {"path": wanted["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | {"oid": blob and (blob.sha256 if lfs else blob.git_oid)})
        return Answer({"files": answers})

    @route("POST", rf"/{SITE}\.git/info/lfs/objects/batch", "write")
    def lfs_batch(self, request: Request, repo: Repo) -> Answer:
        """Answer where to upload each large file; one that is here already needs no upload."""
        objects = []
        for wanted in request.json()["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"], "authenticated": True})
            if self._object(repo, wanted["oid"]):
                continue
            address, header = f"{self.url}/_lfs/{wanted['oid']}", {}
            if wanted["size"] > self._multipart_bytes:
                parts = range(1, math.ceil(wanted["size"] / self._multipart_bytes) + 1)
                header = {"chunk_size": str(self._multipart_bytes)} | {str(n): f"{address}/{n}" for n in parts}
            actions = {"upload": {"href": address, "header": header}, "verify": {"href": f"{address}/verify"}}
            objects[-1]["actions"] = actions
        return Answer({"transfer": "basic", "objects": objects})

    # As on the Hub, whoever holds an upload address may upload to it: these requests carry no token.

    @route("PUT", f"/_lfs/{OID}(?:/(?P<part>[0-9]+))?")
    def lfs_put(self, request: Request, oid: str, part: str | None) -> Answer:
        digest = hashlib.sha256(request.body).hexdigest()
        if part is None and digest != oid:
            raise HubError(400, "The content does not have the announced SHA-256")
        _write(self._objects / (f"{oid}.{part}" if part else oid), request.body)
        return Answer({}, headers={"ETag": f'"{digest}"'})

    @route("POST", f"/_lfs/{OID}")
    def lfs_complete(self, request: Request, oid: str) -> Answer:
        """Join the parts of a multipart upload, in the order of their numbers."""
        parts = [self._objects / f"{oid}.{part['partNumber']}" for part in request.json()["parts"]]
        self.lfs_put(Request(None, {}, b"".join(part.read_bytes() for part in parts)), oid, None)
        for part in parts:
            part.unlink()
        return Answer({})

    @route("POST", f"/_lfs/{OID}/verify")
    def lfs_verify(self, request: Request, oid: str) -> Answer:
        if not (self._objects / oid).is_file():
            raise HubError(404, "The object was not uploaded")
        return Answer({})

    def _object(self, repo: Repo, oid: str) -> Path | None:
        """The large file with this SHA-256: one that was uploaded, or one that the repository holds already."""
        places = [self._objects / oid, *(repo.file(path) for path in repo.files())]
        return next((file for file in places if file.is_file() and self._blob(file).sha256 == oid), None)

    @route("POST", f"/api/{REPO}/commit/{REVISION}", "write")
    def commit(self, request: Request, repo: Repo) -> Answer:
        if "create_pr" in request.query:
            raise HubError(400, "This test server has no pull requests")
        title, message, changes = "", "", []
        for line in request.body.splitlines():
            operation, value = (item := json.loads(line))["key"], item["value"]
            if operation == "header":
                title, message = value["summary"], value.get("description", "")
                if value.get("parentCommit") not in (None, self._head(repo)["id"]):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            else:
                changes.append((repo.file(value["path"]), self._new_content(repo, operation, value)))
        # Only now, when the whole commit has proved to be valid, is anything written.
        for file, content in changes:
            if content is not None:
                _write(file, content)
            elif file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
        sha = self._record(repo, request.user.name, title, message)["id"]
        url = f"{self.url}/{repo.page}/commit/{sha}"
        return Answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _new_content(self, repo: Repo, operation: str, value: dict) -> bytes | None:
        """What a commit's operation puts into its file; nothing for one that deletes."""
        if operation == "file":
            return base64.b64decode(value["content"])
        if operation == "lfsFile":
            if stored := self._object(repo, value["oid"]):
                return stored.read_bytes()
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
        file = repo.file(value["path"])
        if not (file.is_dir() if operation == "deletedFolder" else file.is_file()):
            raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
        return None


def _is_lfs(path: str, size: int) -> bool:
    """Whether the Hub keeps such a file in large-file storage; clients never send an empty file that way."""
    return size > 0 and (path.endswith(LFS_ENDINGS) or size >= LFS_BYTES)


def _write(file: Path, content: bytes) -> None:
    """Put a file in its place in one step, so that nobody reads a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{threading.get_ident()}")
    draft.write_bytes(content)
    draft.replace(file)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # clients open many connections at once; the default of 5 would turn some away
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    """One client connection: reads requests, applies planned faults, and sends what the endpoints answer."""

    protocol_version = "HTTP/1.1"  # keeps connections open between requests, as the Hub does
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for the headers and a short body, instead of one for each line

    def _serve(self) -> None:
        hub = self.server.hub
        body = self._body()  # always read, or what is left of it would be taken for the next request
        path = urlsplit(self.path).path
        if path in ("/_faults", "/_requests"):
            return self._send(self._control(path, body))
        fault = hub.take_fault(self.command, self.path)
        kind = fault and fault.kind
        if kind == "drop":
            hub.requests.append(LoggedRequest(self.command, path, 0))
            return self._hang_up()
        if kind == "delay":
            time.sleep(fault.seconds)
        if isinstance(kind, int):
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            answer = Answer({"error": f"Planned failure {kind}"}, kind, headers)
        else:
            answer = hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
        return self._send(answer, log=path, cut=fault if kind == "cut" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _control(self, path: str, body: bytes) -> Answer:
        """Let another process plan faults (POST /_faults) and read the request log (GET /_requests)."""
        hub = self.server.hub
        if (self.command, path) == ("GET", "/_requests"):
            return Answer([entry._asdict() for entry in hub.requests])
        try:
            hub.fault(**json.loads(body))
        except (TypeError, ValueError) as error:
            return Answer({"error": str(error)}, 400)
        return Answer({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, log: str | None = None, cut: Fault | None = None) -> None:
        is_file = isinstance(answer.content, bytes)
        content = answer.content if is_file else json.dumps(answer.content).encode()
        headers = {"Content-Type": "application/octet-stream" if is_file else "application/json"} | answer.headers
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if is_file and wanted and self.command == "GET":
            first, last = wanted.groups()
            start = int(first) if first else max(len(content) - int(last or 0), 0)
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            answer.status, content = 206, content[start:end]
            if not content:
                answer.status, headers["Content-Range"] = 416, f"bytes */{len(answer.content)}"
        if log is not None:
            # Before the answer: when a client has it, the log has the request.
            self.server.hub.requests.append(LoggedRequest(self.command, log, answer.status))
        self.send_response(answer.status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            self.wfile.write(content[: len(content) // 2 if cut.after is None else cut.after])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may have gone first
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client went away, for instance after its time limit
            self.close_connection = True

    def log_message(self, *message) -> None:
        """Stay silent; `HubServer.requests` is the log."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder of models and datasets as a small Hugging Face Hub.")
    parser.add_argument("--root", required=True, help="folder with models/OWNER/NAME and datasets/OWNER/NAME")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    # A file, because everyone on a machine can read the command lines of its processes.
    parser.add_argument("--access", help='JSON file: {"tokens": {TOKEN: [USER, ROLE]}, "gated": {REPO: [USER, …]}}')
    parser.add_argument("--no-lfs", action="store_true", help="take files of any kind inside commits")
    options = parser.parse_args()
    access = json.loads(Path(options.access).read_text()) if options.access else {}
    with HubServer(options.root, port=options.port, lfs=not options.no_lfs, **access) as hub:
        print(hub.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
