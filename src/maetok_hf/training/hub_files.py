"""`--push_to_hub` of commands: files on their way to the Hub when all work is done, and a check before it begins."""

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import hub, hub_worker
from .hub import refusal


logger = logging.getLogger(__name__)


def check_upload(repo_id: str, *, repo_type: str = "model", private: bool = False) -> str:
    """
    Make sure, before any work, that files can be uploaded; creates the repository if it does not exist.

    Args:
        repo_id (`str`): Repository, with or without a namespace; without one it is the user's own.
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"dataset"`.
        private (`bool`, *optional*, defaults to `False`): Make the repository private if it is created.

    Returns:
        `str`: The repository with its namespace. When the Hub cannot be reached there is a warning, since it may be
        back when the files are there, and this is what was given.

    Raises:
        ValueError: If the Hub refuses: no token or a wrong one, no permission, a name that is not possible.
    """
    return check_access("push_to_hub", repo_id, lambda: hub_worker.upload(repo_id, private, None, "", repo_type))


def check_access(name: str, repo_id: str, ask: Callable[[], Mapping[str, Any]]) -> str:
    """
    Ask the Hub before any work.

    Args:
        name (`str`): Option that names the repository, for messages.
        repo_id (`str`): Repository.
        ask (`Callable[[], Mapping[str, Any]]`): Asks, and returns a dict with its full name as `repo_id`.

    Returns:
        `str`: The repository with its namespace, or what was given if the Hub cannot be reached.

    Raises:
        ValueError: If the Hub refuses.
    """
    result = hub_worker.attempt(ask, ())
    if "error" not in result:
        return result["repo_id"]
    if result["permanent"]:
        raise refusal(name, repo_id, result["error"])
    logger.warning("The Hub cannot be reached, the upload to %s is tried nevertheless: %s", repo_id, result["error"])
    return repo_id


def upload_files(
    folder: str | Path,
    repo_id: str,
    message: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    allow_patterns: Sequence[str] | None = None,
    retry_waits: Sequence[float] | None = None,
) -> str:
    """
    Upload a folder as one commit, now, and try again when the Hub or the network fails.

    Args:
        folder (`str` or `Path`): The folder, which is only read.
        repo_id (`str`): Repository, with or without a namespace. It is created if it does not exist.
        message (`str`): Message of the commit.
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"dataset"`.
        private (`bool`, *optional*, defaults to `False`): Make the repository private if it is created.
        allow_patterns (`Sequence[str]`, *optional*): Patterns of the files that are meant; by default all.
        retry_waits (`Sequence[float]`, *optional*): Seconds before each further attempt, besides those that
            huggingface_hub makes itself; by default 10, 60 and 300. What has been uploaded is not sent again.

    Returns:
        `str`: The repository with its namespace.

    Raises:
        OSError: If it is not uploaded; gives the reason and the command that uploads the same files by hand.
    """
    patterns = None if allow_patterns is None else list(allow_patterns)
    result = hub_worker.attempt(
        lambda: hub_worker.upload(repo_id, private, str(folder), message, repo_type, patterns),
        hub.RETRY_WAITS if retry_waits is None else retry_waits,
    )
    if "error" in result:
        words = ["hf", "upload", repo_id, str(folder), "."]
        words += [] if repo_type == "model" else ["--repo-type", repo_type]
        words += [word for pattern in patterns or () for word in ("--include", pattern)]
        raise OSError(
            f"{folder} is not uploaded to {repo_id}, and is as it was: {result['error']}\n"
            f"To upload it by hand: {shlex.join(words)}"
        )
    return result["repo_id"]
