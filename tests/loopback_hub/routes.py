"""The requests that clients make, and what answers them."""

import base64
import hashlib
import json
import math
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .answers import Answer, Refusal
from .cards import errors_in
from .faults import QUOTA_MESSAGE
from .repositories import DATE, Repository, etag, is_large
from .state import TOKEN, USER, LoopbackHub, check_namespace, check_token


@dataclass
class Request:
    """A request without its connection."""

    method: str
    path: str
    query: dict[str, str]
    token: str | None
    body: bytes
    content_type: str = ""

    def json(self) -> Any:
        return json.loads(self.body)


def whoami(hub: LoopbackHub, request: Request) -> Answer:
    if request.token is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if request.token == TOKEN else "read"
    return Answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})


def validate_card(hub: LoopbackHub, request: Request) -> Answer:
    errors = errors_in(request.json()["content"])
    status = 400 if errors else 200
    return Answer(status, {"errors": [{"message": error} for error in errors], "warnings": []})


def create(hub: LoopbackHub, request: Request) -> Answer:
    wanted = request.json()
    repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
    kind = wanted.get("type") or "model"
    name = repo_id if kind == "model" else f"{kind}s/{repo_id}"
    answer = {"url": f"{hub.endpoint}/{name}", "name": repo_id, "id": repo_id}
    if name in hub.repositories:
        return Answer(409, {"error": f"You already created this {kind} repo"} | answer)
    check_namespace(repo_id)
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    hub.repositories[name] = Repository(name, private=private)
    return Answer(200, answer)


def delete(hub: LoopbackHub, request: Request) -> Answer:
    wanted = request.json()
    repo_id, kind = f"{wanted.get('organization') or USER}/{wanted['name']}", wanted.get("type") or "model"
    name = repo_id if kind == "model" else f"{kind}s/{repo_id}"
    hub.repository(name, request.token, writes=True)
    del hub.repositories[name]
    return Answer(200, {})


def listing(hub: LoopbackHub, request: Request, kind: str) -> Answer:
    found = [
        facts(hub, one, "main")
        for one in hub.names(kind)
        if one.repo_id.startswith(request.query.get("author", ""))
        and request.query.get("search", "") in one.repo_id
        and (not one.private or request.token is not None)
    ]
    return paged(hub, request, found)


def check_access(hub: LoopbackHub, request: Request, repository: Repository, write: str | None) -> Answer:
    if write:
        check_token(request.token, writes=True)
        check_namespace(repository.repo_id)
    return Answer(200, {})


def upload_modes(hub: LoopbackHub, request: Request, repository: Repository, revision: str) -> Answer:
    check_namespace(repository.repo_id)
    _, files = repository.at(revision)
    modes = [
        {
            "path": file["path"],
            "shouldIgnore": False,
            "uploadMode": "lfs" if is_large(file["path"]) else "regular",
            "oid": etag(file["path"], files[file["path"]]) if file["path"] in files else None,
        }
        for file in request.json()["files"]
    ]
    return Answer(200, {"files": modes})


def large_file_batch(hub: LoopbackHub, request: Request, repository: Repository) -> Answer:
    wanted = request.json()
    missing = [one for one in wanted["objects"] if one["oid"] not in hub.large_files]
    used = sum(map(len, hub.large_files.values()))
    if hub.quota is not None and used + sum(one["size"] for one in missing) > hub.quota:
        raise Refusal(403, QUOTA_MESSAGE)
    parts = "multipart" in wanted["transfers"]
    objects = [
        one | ({"actions": actions(hub, repository, one, parts)} if one in missing else {})
        for one in wanted["objects"]
    ]
    return Answer(200, {"transfer": "multipart" if parts and hub.part_size else "basic", "objects": objects})


def actions(hub: LoopbackHub, repository: Repository, wanted: dict[str, Any], parts: bool) -> dict[str, Any]:
    """Where a client puts a large file."""
    verify = {"href": f"{hub.url(repository)}.git/info/lfs/verify"}
    address = f"{hub.storage}/lfs/{wanted['oid']}"
    if not parts or hub.part_size is None or wanted["size"] <= hub.part_size:
        return {"upload": {"href": address}, "verify": verify}
    numbers = range(1, math.ceil(wanted["size"] / hub.part_size) + 1)
    header = {"chunk_size": str(hub.part_size)} | {str(number): f"{address}/{number}" for number in numbers}
    return {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}/complete", "header": header}, "verify": verify}


def put_large_file(hub: LoopbackHub, request: Request, oid: str) -> Answer:
    if request.token is not None:
        raise Refusal(400, "Only one auth mechanism allowed: a token was sent to the storage")
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "The file does not have the announced sha256")
    hub.large_files[oid] = request.body
    return Answer(200)


def put_part(hub: LoopbackHub, request: Request, oid: str, number: str) -> Answer:
    if request.token is not None:
        raise Refusal(400, "Only one auth mechanism allowed: a token was sent to the storage")
    hub.parts[oid, int(number)] = request.body
    return Answer(200, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def complete_parts(hub: LoopbackHub, request: Request, oid: str) -> Answer:
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    data = b"".join(hub.parts.pop((oid, number)) for number in numbers)
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "The parts do not make the announced file")
    hub.large_files[oid] = data
    return Answer(200, {"success": True})


def verify_large_file(hub: LoopbackHub, request: Request, repository: Repository) -> Answer:
    wanted = request.json()
    data = hub.large_files.get(wanted["oid"])
    if data is None or len(data) != wanted["size"]:
        raise Refusal(404, "The object is not in the storage")
    return Answer(200, {"success": True})


def get_large_file(hub: LoopbackHub, request: Request, oid: str) -> Answer:
    if request.token is not None:
        raise Refusal(400, "Only one auth mechanism allowed: a token was sent to the storage")
    return Answer(200, hub.large_files[oid], {"ETag": f'"{oid}"'})


def commit(hub: LoopbackHub, request: Request, repository: Repository, revision: str) -> Answer:
    header: dict[str, Any] = {}
    changes: dict[str, bytes | None] = {}
    _, files = repository.at(revision)
    for line in request.body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            header = value
        elif entry["key"] == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            changes[value["path"]] = hub.large_files[value["oid"]]
        elif entry["key"] == "deletedFile":
            changes[value["path"]] = None
        elif entry["key"] == "deletedFolder":
            changes |= {path: None for path in files if path.startswith(value["path"].rstrip("/") + "/")}
        else:
            raise Refusal(400, f"cannot {entry['key']}")
    parent = header.get("parentCommit")
    if parent is not None and not repository.at(revision)[0].startswith(parent):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    errors = errors_in(changes["README.md"].decode()) if changes.get("README.md") else []
    if errors:
        raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    branch, pull_request = repository.ref(revision), {}
    if request.query.get("create_pr"):
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        repository.refs[branch := f"refs/pr/{number}"] = repository.at(revision)[0]
        pull_request = {"pullRequestUrl": hub.url(repository, f"/discussions/{number}")}
    if branch is None or branch.startswith("refs/tags/"):
        raise Refusal(404, f"Invalid branch: {revision}", "RevisionNotFound")
    sha = repository.commit(header["summary"], changes, branch)
    answer = {"commitUrl": hub.url(repository, f"/commit/{sha}"), "commitOid": sha, "success": True}
    return Answer(200, answer | pull_request)


def facts(hub: LoopbackHub, repository: Repository, revision: str) -> dict[str, Any]:
    """What the Hub says of a repository."""
    sha, files = repository.at(revision)
    return {
        "_id": hashlib.sha1(repository.name.encode()).hexdigest()[:24],
        "id": repository.repo_id,
        "modelId": repository.repo_id,
        "author": repository.repo_id.split("/")[0],
        "sha": sha,
        "private": repository.private,
        "gated": "auto" if repository.gated else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "createdAt": DATE,
        "lastModified": DATE,
        "siblings": [{"rfilename": path} | _sizes(path, data) for path, data in sorted(files.items())],
    }


def _sizes(path: str, data: bytes) -> dict[str, Any]:
    large = {"lfs": {"sha256": etag(path, data), "size": len(data), "pointerSize": 130}} if is_large(path) else {}
    return {"size": len(data), "blobId": etag(path, data)} | large


def info(hub: LoopbackHub, request: Request, repository: Repository, revision: str | None) -> Answer:
    return Answer(200, facts(hub, repository, revision or "main"))


def refs(hub: LoopbackHub, request: Request, repository: Repository) -> Answer:
    answer: dict[str, list[Any]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    places = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, sha in repository.refs.items():
        prefix = next(prefix for prefix in places if ref.startswith(prefix))
        answer[places[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
    return Answer(200, answer)


def create_branch(hub: LoopbackHub, request: Request, repository: Repository, name: str) -> Answer:
    return _new_ref(repository, f"refs/heads/{name}", (request.body and request.json() or {}).get("startingPoint"))


def create_tag(hub: LoopbackHub, request: Request, repository: Repository, revision: str) -> Answer:
    return _new_ref(repository, f"refs/tags/{request.json()['tag']}", revision)


def _new_ref(repository: Repository, ref: str, revision: str | None) -> Answer:
    if ref in repository.refs:
        raise Refusal(409, f"Reference already exists: {ref}")
    repository.refs[ref] = repository.at(revision or "main")[0]
    return Answer(200, {})


def delete_ref(hub: LoopbackHub, request: Request, repository: Repository, kind: str, name: str) -> Answer:
    ref = f"refs/{ {'branch': 'heads', 'tag': 'tags'}[kind] }/{name}"
    if repository.refs.pop(ref, None) is None:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer(200, {})


def history(hub: LoopbackHub, request: Request, repository: Repository, revision: str) -> Answer:
    return paged(hub, request, repository.history(revision))


def tree(
    hub: LoopbackHub, request: Request, repository: Repository, revision: str, folder: str | None = None
) -> Answer:
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    return paged(hub, request, list(repository.entries(revision, (folder or "").strip("/"), recursive)))


def paged(hub: LoopbackHub, request: Request, entries: list[Any]) -> Answer:
    """One page of a listing, with the address of the next one as the Hub gives it."""
    start = int(request.query.get("cursor", 0))
    end = start + hub.page_size
    headers = {}
    if end < len(entries):
        query = urllib.parse.urlencode(request.query | {"cursor": end})
        headers["Link"] = f'<{hub.endpoint}{request.path}?{query}>; rel="next"'
    return Answer(200, entries[start:end], headers)


def paths_info(hub: LoopbackHub, request: Request, repository: Repository, revision: str) -> Answer:
    _, files = repository.at(revision)
    form = "json" not in request.content_type
    wanted = urllib.parse.parse_qs(request.body.decode()).get("paths", []) if form else request.json()["paths"]
    everything = {entry["path"]: entry for entry in repository.entries(revision, "", recursive=True)}
    return Answer(200, [everything[path.rstrip("/")] for path in wanted if path.rstrip("/") in everything])


def resolve(hub: LoopbackHub, request: Request, repository: Repository, revision: str, path: str) -> Answer:
    sha, files = repository.at(revision)
    if path not in files:
        raise Refusal(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": sha})
    tag, data = etag(path, files[path]), files[path]
    headers = {"ETag": f'"{tag}"', "X-Repo-Commit": sha}
    if not is_large(path):
        return Answer(200, data, headers)
    hub.large_files.setdefault(tag, data)
    headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data)), "Location": f"{hub.storage}/lfs/{tag}"}
    return Answer(302, b"", headers)


# pattern of "METHOD path", what answers it, whether it needs a token that may write; a repository is one group
REPO = r"(?P<api>(?:models|datasets|spaces)/[^/]+/[^/]+)"
SITE = r"(?P<site>(?:datasets/|spaces/)?[^/]+/[^/]+)"
ROUTES: list[tuple[re.Pattern, Callable[..., Answer], bool]] = [
    (re.compile(pattern), route, writes)
    for pattern, route, writes in (
        (r"GET /api/whoami-v2", whoami, False),
        (r"POST /api/validate-yaml", validate_card, False),
        (r"POST /api/repos/create", create, True),
        (r"DELETE /api/repos/delete", delete, True),
        (r"GET /api/(models|datasets|spaces)", listing, False),
        (rf"GET /api/{REPO}/auth-check(/write)?", check_access, False),
        (rf"POST /api/{REPO}/preupload/(.+)", upload_modes, True),
        (rf"POST /{SITE}\.git/info/lfs/objects/batch", large_file_batch, True),
        (rf"POST /{SITE}\.git/info/lfs/verify", verify_large_file, True),
        (r"PUT /lfs/([0-9a-f]{64})", put_large_file, False),
        (r"PUT /lfs/([0-9a-f]{64})/(\d+)", put_part, False),
        (r"POST /lfs/([0-9a-f]{64})/complete", complete_parts, False),
        (r"GET /lfs/([0-9a-f]{64})", get_large_file, False),
        (rf"POST /api/{REPO}/commit/(.+)", commit, True),
        (rf"GET /api/{REPO}/refs", refs, False),
        (rf"POST /api/{REPO}/branch/(.+)", create_branch, True),
        (rf"POST /api/{REPO}/tag/(.+)", create_tag, True),
        (rf"DELETE /api/{REPO}/(branch|tag)/(.+)", delete_ref, True),
        (rf"GET /api/{REPO}/commits/(.+)", history, False),
        (rf"GET /api/{REPO}/tree/([^/]+)(/.*)?", tree, False),
        (rf"POST /api/{REPO}/paths-info/(.+)", paths_info, False),
        (rf"GET /api/{REPO}(?:/revision/(.+))?", info, False),
        (rf"GET /{SITE}/resolve/([^/]+)/(.+)", resolve, False),
    )
]


def answer(hub: LoopbackHub, request: Request) -> Answer:
    """Find the route of a request and follow it."""
    line = f"{request.method.replace('HEAD', 'GET')} {request.path}"
    for pattern, route, writes in ROUTES:
        match = pattern.fullmatch(line)
        if match is None:
            continue
        check_token(request.token, writes)
        names = match.groupdict()
        groups = [value and urllib.parse.unquote(value) for value in match.groups()]
        if not names:
            return route(hub, request, *groups)
        name = groups[0].removeprefix("models/") if "api" in names else groups[0]
        repository = hub.repository(name, request.token, writes, reads_files=route is resolve)
        return route(hub, request, repository, *groups[1:])
    raise Refusal(404, f"no route {line}")
