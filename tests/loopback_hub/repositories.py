"""Repositories: files after each commit, branches, tags and pull requests."""

import hashlib
from collections.abc import Iterator
from typing import Any

from .answers import Refusal


LARGE_FILES = (".safetensors", ".bin", ".npz", ".parquet", ".png", ".jpg")
DATE = "2025-01-01T00:00:00.000Z"


def git_oid(data: bytes) -> str:
    """Name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    """Whether the Hub keeps a file in its large file storage."""
    return path.endswith(LARGE_FILES)


def etag(path: str, data: bytes) -> str:
    """Name under which clients keep a file."""
    return hashlib.sha256(data).hexdigest() if is_large(path) else git_oid(data)


class Repository:
    """
    A repository by the name that its address has: `user/model`, `datasets/user/data` or `spaces/user/space`.

    Without `gated` or `private` anyone may read it; with `gated` tokens that `accepted` its terms, with `private`
    those of its owner.
    """

    def __init__(self, name: str, private: bool = False, gated: bool = False):
        self.name, self.private, self.gated = name, private, gated
        self.accepted: set[str] = set()
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []  # sha, message, files
        self.refs: dict[str, str] = {}
        self.commit("initial commit", {})

    @property
    def repo_id(self) -> str:
        return "/".join(self.name.split("/")[-2:])

    @property
    def sha(self) -> str:
        return self.refs["refs/heads/main"]

    @property
    def messages(self) -> list[str]:
        """Messages of all commits but the first, which makes the repository."""
        return [message for _, message, _ in self.commits[1:]]

    @property
    def files(self) -> dict[str, bytes]:
        """Files of the branch `main`."""
        return self.at("main")[1]

    def commit(self, message: str, changes: dict[str, bytes | None], branch: str = "refs/heads/main") -> str:
        """Add, replace or (`None`) remove files on a branch, and return the commit."""
        files = (self.at(branch)[1] if branch in self.refs else {}) | changes
        sha = hashlib.sha1(f"{self.name} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((sha, message, {path: data for path, data in files.items() if data is not None}))
        self.refs[branch] = sha
        return sha

    def ref(self, revision: str) -> str | None:
        """Full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a branch, a tag, a pull request, or a commit that may be shortened."""
        name = self.ref(revision)
        wanted = self.refs[name] if name is not None else revision
        for sha, _, files in reversed(self.commits):
            if sha == wanted or (len(wanted) >= 7 and sha.startswith(wanted)):
                return sha, files
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        """What the Hub says of a file."""
        facts = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if is_large(path):
            facts["lfs"] = {"oid": etag(path, data), "size": len(data), "pointerSize": 130}
        return facts

    def entries(self, revision: str, folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
        """Files and folders below a folder, the root if it is empty."""
        _, files = self.at(revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        seen = set()
        for path, data in sorted(inside.items()):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                if name not in seen:
                    seen.add(name)
                    yield {"type": "directory", "path": name, "size": 0, "oid": git_oid(name.encode())}
            if recursive or len(parts) == 1:
                yield self.entry(path, data)

    def history(self, revision: str) -> list[dict[str, Any]]:
        """Commits, the newest first."""
        last, _ = self.at(revision)
        shas = [sha for sha, _, _ in self.commits]
        return [
            {"id": sha, "title": message, "message": "", "authors": [{"user": "user"}], "date": DATE}
            for sha, message, _ in reversed(self.commits[: shas.index(last) + 1])
        ]
