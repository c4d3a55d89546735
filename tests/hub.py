"""A Hub on the loopback interface, in memory: model repositories that the real clients create, fill and load from.

It speaks what huggingface_hub, diffusers and transformers ask with `HF_HUB_DISABLE_XET=1` (LFS instead of Xet), and
fails on demand. It proves our side of an exchange, not how the real Hub behaves.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple


USER = "user"
TOKEN = "hf_write"
READ_TOKEN = "hf_read"
LARGE_FILES = (".safetensors", ".bin", ".png", ".jpg")


class Answer(NamedTuple):
    """What a request gets: JSON unless the body is bytes."""

    status: int
    body: Any = b""
    headers: dict[str, str] = {}


class Refusal(Exception):
    """An answer that ends a request."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


class Repository:
    """The files of a model repository, by path, after each commit."""

    def __init__(self, repo_id: str, private: bool = False):
        self.repo_id, self.private = repo_id, private
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []  # sha, message, files
        self.commit("initial commit", {})

    @property
    def sha(self) -> str:
        return self.commits[-1][0]

    @property
    def messages(self) -> list[str]:
        return [message for _, message, _ in self.commits[1:]]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def commit(self, message: str, changes: dict[str, bytes | None]) -> str:
        files = (self.files if self.commits else {}) | changes
        sha = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((sha, message, {path: data for path, data in files.items() if data is not None}))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        for sha, _, files in reversed(self.commits):
            if revision in ("main", sha):
                return sha, files
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Failure:
    """The next `times` requests of which "METHOD path" matches get a status, or no answer at all."""

    pattern: str
    status: int | None
    times: int
    message: str


@dataclass
class LoopbackHub:
    """
    State of the server: repositories, uploaded large files, failures to come, and what was asked.

    `TOKEN` may write in the namespace of `USER`, `READ_TOKEN` may read, any other token is wrong.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    requests: list[tuple[str, str, int | None]] = field(default_factory=list)  # method, path, status
    lock: threading.RLock = field(default_factory=threading.RLock)  # who holds it makes the Hub hang

    def fail(self, pattern: str, status: int | None, times: int = 1_000_000, message: str = "on demand") -> None:
        """
        Make requests fail.

        Args:
            pattern: Regular expression that is searched in "METHOD /path".
            status: HTTP status, or `None` to cut the connection.
            times: How many of them fail, then they succeed again.
            message: What the Hub says.
        """
        self.failures.append(Failure(pattern, status, times, message))

    def count(self, pattern: str) -> int:
        """How many requests there were of which "METHOD path" matches."""
        return sum(re.search(pattern, f"{method} {path}") is not None for method, path, _ in self.requests)

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What a client's process needs; huggingface_hub reads most of it when it is imported."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
        }

    def failure_of(self, request: str) -> Failure | None:
        """The failure that a request is due, if any."""
        for failure in self.failures:
            if failure.times > 0 and re.search(failure.pattern, request):
                failure.times -= 1
                return failure
        return None

    def answer(self, method: str, path: str, token: str | None, data: bytes) -> Answer:
        """Find the route of a request."""
        for pattern, route, writes in ROUTES:
            if match := re.fullmatch(pattern, f"{method.replace('HEAD', 'GET')} {path}"):
                check_token(token, writes)
                return route(self, *map(urllib.parse.unquote, match.groups()), data=data, token=token)
        raise Refusal(404, f"no route {method} {path}")

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo_id]


def check_token(token: str | None, writes: bool) -> None:
    """Loading needs no token, but a wrong one is refused; writing needs one that may."""
    if token not in (None, TOKEN, READ_TOKEN):
        raise Refusal(401, "Invalid credentials in Authorization header")
    if writes and token is None:
        raise Refusal(401, "Invalid username or password.")
    if writes and token != TOKEN:
        raise Refusal(403, "You don't have the rights to write with this token")


def check_namespace(repo_id: str) -> None:
    if repo_id.split("/")[0] != USER:
        raise Refusal(403, f"You don't have the rights to create a model under the namespace of {repo_id}")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LARGE_FILES)


def etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_large(path) else git_oid(data)


def whoami(hub: LoopbackHub, *, token: str | None, **request: Any) -> Answer:
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if token == TOKEN else "read"
    return Answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})


def validate_card(hub: LoopbackHub, **request: Any) -> Answer:
    return Answer(200, {"errors": [], "warnings": []})


def create(hub: LoopbackHub, *, data: bytes, token: str | None) -> Answer:
    wanted = json.loads(data)
    repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
    answer = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in hub.repositories:
        return Answer(409, {"error": "You already created this model repo"} | answer)
    check_namespace(repo_id)
    hub.repositories[repo_id] = Repository(repo_id, private=wanted.get("visibility") == "private")
    return Answer(200, answer)


def check_write_access(hub: LoopbackHub, repo_id: str, **request: Any) -> Answer:
    hub.repository(repo_id)
    check_namespace(repo_id)
    return Answer(200, {})


def upload_modes(hub: LoopbackHub, repo_id: str, *, data: bytes, **request: Any) -> Answer:
    hub.repository(repo_id)
    check_namespace(repo_id)
    files = [
        {
            "path": file["path"],
            "shouldIgnore": False,
            "uploadMode": "lfs" if is_large(file["path"]) else "regular",
        }
        for file in json.loads(data)["files"]
    ]
    return Answer(200, {"files": files})


def large_file_batch(hub: LoopbackHub, repo_id: str, *, data: bytes, **request: Any) -> Answer:
    objects = []
    for wanted in json.loads(data)["objects"]:
        known = wanted["oid"] in hub.large_files
        actions = {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}}
        objects.append(wanted | {"authenticated": True} | ({} if known else actions))
    return Answer(200, {"transfer": "basic", "objects": objects})


def put_large_file(hub: LoopbackHub, oid: str, *, data: bytes, **request: Any) -> Answer:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "The file does not have the announced sha256")
    hub.large_files[oid] = data
    return Answer(200)


def commit(hub: LoopbackHub, repo_id: str, *, data: bytes, **request: Any) -> Answer:
    repository = hub.repository(repo_id)
    message, changes = "", {}
    for line in data.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            message = value["summary"]
        elif entry["key"] == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            changes[value["path"]] = hub.large_files[value["oid"]]
        elif entry["key"] == "deletedFile":
            changes[value["path"]] = None
        else:
            raise Refusal(400, f"cannot {entry['key']}")
    sha = repository.commit(message, changes)
    return Answer(200, {"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})


def info(hub: LoopbackHub, repo_id: str, revision: str | None = None, **request: Any) -> Answer:
    repository = hub.repository(repo_id)
    sha, files = repository.at(revision or "main")
    siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
    names = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "tags": [], "private": repository.private}
    return Answer(200, names | {"siblings": siblings})


def tree(hub: LoopbackHub, repo_id: str, revision: str, folder: str | None = None, **request: Any) -> Answer:
    _, files = hub.repository(repo_id).at(revision)
    prefix = f"{folder}/" if folder else ""
    entries = [
        {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        | ({"lfs": {"oid": etag(path, data), "size": len(data), "pointerSize": 130}} if is_large(path) else {})
        for path, data in files.items()
        if path.startswith(prefix)
    ]
    return Answer(200, entries)


def resolve(hub: LoopbackHub, repo_id: str, revision: str, path: str, **request: Any) -> Answer:
    sha, files = hub.repository(repo_id).at(revision)
    if path not in files:
        missing = Refusal(404, f"{path} does not exist", "EntryNotFound").answer
        return missing._replace(headers=missing.headers | {"X-Repo-Commit": sha})
    tag, size = etag(path, files[path]), str(len(files[path]))
    headers = {"ETag": f'"{tag}"', "X-Repo-Commit": sha}
    if is_large(path):
        headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": size}
    return Answer(200, files[path], headers)


# pattern of "METHOD path", what answers it, whether it needs a token that may write
REPO = r"([^/]+/[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", whoami, False),
    (r"POST /api/validate-yaml", validate_card, False),
    (r"POST /api/repos/create", create, True),
    (rf"GET /api/models/{REPO}/auth-check/write", check_write_access, True),
    (rf"POST /api/models/{REPO}/preupload/main", upload_modes, True),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", large_file_batch, True),
    (r"PUT /lfs/([0-9a-f]{64})", put_large_file, False),
    (rf"POST /api/models/{REPO}/commit/main", commit, True),
    (rf"GET /api/models/{REPO}", info, False),
    (rf"GET /api/models/{REPO}/revision/([^/]+)", info, False),
    (rf"GET /api/models/{REPO}/tree/([^/]+)", tree, False),
    (rf"GET /api/models/{REPO}/tree/([^/]+)/(.+)", tree, False),
    (rf"GET /{REPO}/resolve/([^/]+)/(.+)", resolve, False),
]


class Handler(BaseHTTPRequestHandler):
    """HTTP around a [`LoopbackHub`]."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args) -> None:
        pass

    def handle_request(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        data = self.read_body()
        with self.hub.lock:
            answer = self.decide(path, data)
            self.hub.requests.append((self.command, path, answer and answer.status))
        if answer is None:
            self.close_connection = True
        else:
            self.write(answer)

    def decide(self, path: str, data: bytes) -> Answer | None:
        """The answer, or `None` to cut the connection."""
        failure = self.hub.failure_of(f"{self.command} {path}")
        if failure is not None:
            return failure.status and Refusal(failure.status, failure.message).answer
        try:
            return self.hub.answer(self.command, path, self.token(), data)
        except Refusal as refusal:
            return refusal.answer

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def write(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/octet-stream" if body is answer.body else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve_hub() -> Iterator[LoopbackHub]:
    """
    Serve a Hub without repositories.

    Yields:
        Its state; clients need the variables of [`LoopbackHub.environment`].
    """
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_folder(folder: Path, repo_id: str) -> Iterator[str]:
    """
    Serve a folder as a model repo.

    Yields:
        The address that a client takes as `HF_ENDPOINT`; its process also needs `HF_HUB_DISABLE_XET=1`.
    """
    with serve_hub() as hub:
        hub.repositories[repo_id] = Repository(repo_id)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.repositories[repo_id].commit("the folder", files)
        yield hub.endpoint
