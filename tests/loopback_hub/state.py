"""What the server knows: repositories, large files, faults to come, and what was asked."""

import re
import threading
import urllib.parse
from dataclasses import dataclass, field

from .answers import Refusal
from .faults import ALWAYS, Fault
from .repositories import Repository


USER = "user"
TOKEN = "hf_write"
READ_TOKEN = "hf_read"


@dataclass
class LoopbackHub:
    """
    A Hub; `TOKEN` may write in the namespace of `USER`, `READ_TOKEN` may read there, any other token is wrong.

    Attributes:
        endpoint: Its address.
        storage: Address of the large file storage, which must never see a token.
        repositories: Repositories by the name in their address, `user/model` or `datasets/user/data`.
        large_files: Uploaded large files by their sha256.
        parts: Uploaded parts of large files that are not complete.
        quota: Bytes of all large files that there is room for.
        part_size: Files of more bytes are uploaded in parts of so many.
        page_size: Entries of one page of a listing.
        requests: Method, path and status (`None` where the connection was cut).
        lock: Who holds it makes the Hub hang.
    """

    endpoint: str = ""
    storage: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    quota: int | None = None
    part_size: int | None = None
    page_size: int = 1000
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, int | None]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, name: str, files: dict[str, bytes] | None = None, **access: bool) -> Repository:
        """Make a repository with a first commit of files."""
        self.repositories[name] = repository = Repository(name, **access)
        if files:
            repository.commit("first files", files)
        return repository

    def fail(
        self,
        pattern: str,
        status: int,
        times: int = ALWAYS,
        message: str = "on demand",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Refuse requests; see [`Fault`]."""
        self.faults.append(Fault(pattern, times, status=status, message=message, headers=headers or {}))

    def cut(self, pattern: str, times: int = ALWAYS, after: int = 0) -> None:
        """Cut the connection of requests, after some bytes of the body that they send or else receive."""
        self.faults.append(Fault(pattern, times, cut_after=after))

    def slow(self, pattern: str, seconds: float, times: int = ALWAYS) -> None:
        """Answer requests late."""
        self.faults.append(Fault(pattern, times, delay=seconds))

    def fault_of(self, request: str) -> Fault | None:
        """The fault that a request is due, if any."""
        with self.lock:
            return next((fault for fault in self.faults if fault.concerns(request)), None)

    def count(self, pattern: str) -> int:
        """How many requests there were of which "METHOD path" matches."""
        return sum(re.search(pattern, f"{method} {path}") is not None for method, path, _ in self.requests)

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What a client's process needs; most of it is read when the client is imported."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_TOKEN": token or "",
        }

    def repository(self, name: str, token: str | None, writes: bool = False, reads_files: bool = False) -> Repository:
        """A repository for the bearer of a token, who may not learn that it exists if it is private, nor read the
        files of one that is gated."""
        repository = self.repositories.get(name)
        owner = repository is not None and repository.repo_id.split("/")[0] == USER and token is not None
        if repository is None or (repository.private and not owner):
            # without a token the Hub answers 401 for all that it does not show
            raise Refusal(404 if token else 401, "Repository not found", "RepoNotFound")
        if reads_files and repository.gated and token not in repository.accepted and not owner:
            raise Refusal(
                403 if token else 401,
                f"Access to model {repository.repo_id} is restricted. You must have access to it and be "
                "authenticated to access it. Please log in.",
                "GatedRepo",
            )
        if writes:
            check_namespace(repository.repo_id)
        return repository

    def names(self, kind: str) -> list[Repository]:
        """Repositories of a kind: `models`, `datasets` or `spaces`."""
        prefix = "" if kind == "models" else f"{kind}/"
        return [one for one in self.repositories.values() if one.name == prefix + one.repo_id]

    def url(self, repository: Repository, rest: str = "") -> str:
        """Address of a repository on the site."""
        return f"{self.endpoint}/{repository.name}{urllib.parse.quote(rest)}"


def check_token(token: str | None, writes: bool) -> None:
    """Loading needs no token, but a wrong one is refused; writing needs one that may."""
    if token not in (None, TOKEN, READ_TOKEN):
        raise Refusal(401, "Invalid credentials in Authorization header")
    if writes and token is None:
        raise Refusal(401, "Invalid username or password.")
    if writes and token != TOKEN:
        raise Refusal(403, "You don't have the rights to write with this token")


def check_namespace(repo_id: str) -> None:
    """Writing is possible in the user's own namespace."""
    if repo_id.split("/")[0] != USER:
        raise Refusal(403, f"You don't have the rights to create a model under the namespace of {repo_id}")
